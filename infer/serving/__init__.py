"""An OpenAI-compatible server over one engine, and conversations in a terminal."""
