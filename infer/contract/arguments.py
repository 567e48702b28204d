"""Refuses arguments that make no sense."""

from __future__ import annotations


def at_least(least: int, **given: int) -> None:
    """ValueError that names the first of these arguments that is less."""
    for name, value in given.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
