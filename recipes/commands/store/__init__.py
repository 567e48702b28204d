"""The `draftsmith store` commands."""
