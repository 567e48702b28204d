"""A training run: its settings, Lightning module, optimisers, callbacks and folder."""
