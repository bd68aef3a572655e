"""What happened: metrics, layers, histories, suggestions."""
