"""Image input: check, decode, cut into tiles, arrange as tokens."""
