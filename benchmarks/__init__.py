"""Speed and memory, side by side in one process: `python -m benchmarks`. What is measured and why: README.md here."""
