"""Messages between a leader and its slices."""
