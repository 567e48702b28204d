"""Measured pass costs, calibrated confidence, and the policy that spends them."""
