"""The runner: passes of a causal LM over an arena of slots."""
