"""The GPU work of a step by item, its floor and an estimate; see `docs/gpu-account.md`."""
