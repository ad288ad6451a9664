"""What a model family tells the rest of the system, and which families there are."""
