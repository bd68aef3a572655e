"""Holds what limits share: fixed ones, memory, windows."""
