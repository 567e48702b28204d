"""Traces in, numbers out: bench, replay, compare."""
