"""Files on disk: atomic writes, the cache folder, and the facts that every run records."""
