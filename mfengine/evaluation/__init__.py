"""How near samples are to the data."""
