"""Which draft would pay, from timings of random weights, before anything is trained."""
