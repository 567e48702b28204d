"""Several drafters as one: their candidates are merged into one tree."""
