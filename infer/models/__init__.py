"""Running causal LMs over token trees: caches, masks, layers, loading, and the targets built on them."""
