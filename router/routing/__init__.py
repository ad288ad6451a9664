"""The choice of a group for a request, and the migration of a running request."""
