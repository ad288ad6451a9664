"""The engine of one replica group: schedules steps, assigns KV blocks and applies results.

`Scheduler` and `BlockManager` are sans-I/O; `Engine` drives them against an `Executor`.
"""
