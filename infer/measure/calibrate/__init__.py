"""Confidence against acceptance, and pass costs, measured on held-out prompts."""
