"""The memory planner: what each rank will hold, before anything is placed."""
