"""One page from run folders: which drafter to use, and why."""
