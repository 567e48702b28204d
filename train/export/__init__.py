"""Finished drafts as Hugging Face checkpoints, model cards and Hub uploads."""
