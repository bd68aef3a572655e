"""Reads the log of a run, for the command line: `python -m optax_clip`."""
