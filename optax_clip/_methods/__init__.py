"""The named transformations: one file for each paper."""
