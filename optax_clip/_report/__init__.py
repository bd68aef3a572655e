"""Shows what happened: metrics, layers, histories, suggestions."""
