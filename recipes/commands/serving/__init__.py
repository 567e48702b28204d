"""`serve` and `chat`."""
