"""Decides whether to take a step at all."""
