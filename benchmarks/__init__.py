"""Benchmarks: `pytest benchmarks` on any machine, `python -m benchmarks.gpu` on a GPU."""
