"""The accepted_length of drawn chains from log-probabilities, without decoding."""
