"""Benchmarks of optax_clip: `python -m benchmarks --help`."""
