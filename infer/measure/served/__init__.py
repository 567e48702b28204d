"""Servers under load: speed, latency and acceptance by the number of concurrent requests."""
