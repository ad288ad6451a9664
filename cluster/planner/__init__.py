"""The memory planner: the bytes of each rank, before a group is placed."""
