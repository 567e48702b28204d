"""Verification rules: which drafted tokens are accepted, and the target's own next token."""
