"""Training objectives: what a draft's loss is."""
