"""A chat in a terminal: the conversation, here or through a server, and the screen."""
