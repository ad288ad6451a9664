"""Weights on disk: reading, checking, importing."""
