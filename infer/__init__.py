"""Targets, drafters, verification and the one decoding step."""
