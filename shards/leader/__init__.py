"""The leader's side of a group: executors that drive the slices, health and failure handling."""
