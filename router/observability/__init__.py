"""Metrics, traces and the request log of the gateway."""
