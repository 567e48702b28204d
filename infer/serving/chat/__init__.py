"""A conversation in the terminal, with an engine or a server."""
