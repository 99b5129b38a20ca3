"""Benchmarks: speed and memory side by side in one process. `python -m benchmarks`."""
