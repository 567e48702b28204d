"""REST (arXiv 2311.08252): drafts from exact suffix matches in a store."""
