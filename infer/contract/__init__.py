"""The protocols (Target, Drafter, Rule) and what they pass to one another."""
