"""Data sets of latents: format, reading, writing, and what they are made from."""
