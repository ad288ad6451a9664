"""Images on their way into a model: checked, decoded, cut into tiles, laid out as tokens."""
