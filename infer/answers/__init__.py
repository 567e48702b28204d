"""A target's own answers to prompts, from a local model or a server; resumable."""
