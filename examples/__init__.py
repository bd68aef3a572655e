"""Programs to start from: each a file of its own, but for `language_model`."""
