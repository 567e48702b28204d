"""Drafters with heads: small modules that read the target's own states."""
