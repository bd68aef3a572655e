"""Joins measure, threshold and action, and notes what they did."""
