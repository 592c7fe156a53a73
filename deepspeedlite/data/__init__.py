"""Training data: see `loader`."""
