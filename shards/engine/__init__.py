"""The engine of one replica group: what is in a step, block by block, and what came of it.

`Scheduler` and `BlockManager` are sans-I/O; `Engine` drives them against an `Executor`.
"""
