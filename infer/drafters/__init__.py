"""Learned drafters and the controls that every measurement offers."""
