"""KV events: the blocks that the groups hold, told to routers outside of arriero."""
