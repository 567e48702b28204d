"""The protocols (Target, Drafter, Rule) and the data that they exchange."""
