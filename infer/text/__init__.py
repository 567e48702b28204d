"""Text in: records and their formats, chat templates, tokenizers."""
