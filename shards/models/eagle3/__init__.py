"""EAGLE-3 heads: one layer that drafts tokens from activations of the target model."""
