"""Metrics of how close samples are to the data."""
