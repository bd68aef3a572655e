"""Tells leaves apart: floats, labels, layers, units."""
