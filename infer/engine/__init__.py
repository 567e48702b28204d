"""The decoding step and the loop that drives it."""
