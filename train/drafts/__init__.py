"""What can be trained: the shapes, initial weights and exits of a draft model."""
