"""`draftsmith quickstart`: train, retrieve and compare on text that every machine has."""
