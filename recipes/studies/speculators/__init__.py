"""EAGLE-3 heads beside speculators, another project's trainer, in an environment of its own."""
