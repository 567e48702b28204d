"""A target whose weights are split over several ranks by transformers' own tensor-parallel plan."""
