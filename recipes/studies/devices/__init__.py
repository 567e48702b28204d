"""What several devices and machines would give, and what they cost."""
