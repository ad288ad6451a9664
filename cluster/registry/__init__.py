"""The registry actor: which groups and gateways serve now, and the history of events."""
