"""Stores on disk: documents, token streams, segments, and the format that all kinds share."""
