"""Heads: small modules that draft from a target's own states; their weights, files and formats."""
