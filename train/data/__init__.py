"""Conversations to packed batches."""
