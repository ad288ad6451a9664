"""Which group holds which KV blocks: a gateway's picture of all groups' caches, to route on."""
