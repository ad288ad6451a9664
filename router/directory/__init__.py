"""The KV directory: the KV blocks of all groups, recorded in each gateway for routing."""
