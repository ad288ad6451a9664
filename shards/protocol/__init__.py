"""Messages between leader and slices."""
