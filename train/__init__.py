"""Training draft models."""
