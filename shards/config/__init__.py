"""Frozen settings of a group: layout, limits, KV tiers, sampling parameters."""
