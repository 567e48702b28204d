"""The target's distributions that a draft learns from: live, or cached on disk."""
