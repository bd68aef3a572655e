"""Whether a step is taken at all."""
