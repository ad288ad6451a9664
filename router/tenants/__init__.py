"""API keys, tenants, limits and fair queues."""
