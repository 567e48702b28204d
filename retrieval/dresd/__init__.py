"""DReSD (arXiv 2502.15572): drafts from nearest neighbours of the target's hidden states."""
