"""The KV cache past the device: tiers, their bytes, and copies between them."""
