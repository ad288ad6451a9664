"""Model families: the layers of a slice, for each family."""
