"""The worker: the loop of a slice, which runs step plans on one rank."""
