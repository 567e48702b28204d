"""Rules and kinds of drafts in sampled text, at equal nodes."""
