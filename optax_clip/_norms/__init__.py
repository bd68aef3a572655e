"""Measures exactly how large updates are, in every dtype, on every mesh and backend."""
