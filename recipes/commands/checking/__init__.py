"""Commands that check: what is installed, and whether a draft or a target is what it should be."""
