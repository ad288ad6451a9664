"""Drafts of tokens that a model on the slices makes."""
