"""Scripts that check the project's own claims. They are not installed with the package."""
