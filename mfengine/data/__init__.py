"""Data sets of latents: format, reading, writing, and their sources."""
