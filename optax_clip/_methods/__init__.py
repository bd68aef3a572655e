"""Defines the named transformations: one file for each paper."""
