"""What a person runs: the draftsmith command."""
