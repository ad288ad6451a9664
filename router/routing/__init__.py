"""The choice of a group for a request, and the move of a running request to another group."""
