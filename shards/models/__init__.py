"""Model families: configuration and one slice's layers of each."""
