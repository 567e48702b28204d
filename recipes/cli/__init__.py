"""The `draftsmith` command line: its commands, parsing, progress and error messages."""
