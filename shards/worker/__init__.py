"""A slice's side of a group: the loop that runs step plans on one rank."""
