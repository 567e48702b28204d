"""Commands that answer as they are asked: the server and the chat."""
