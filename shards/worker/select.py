"""The runner for a device: CPU or CUDA."""

from __future__ import annotations

from arriero.shards.config.group import GroupConfig
from arriero.shards.models.loader import Progress
from arriero.shards.worker.runner import Runner


def runner_for(
    config: GroupConfig, rank: int, *, progress: Progress = lambda done, total: None
) -> Runner:
    """The runner for the group's device; arguments as `Runner`'s."""
    if config.device == "cpu":
        return Runner(config, rank, progress=progress)
    from arriero.shards.worker.cuda.runner import CudaRunner

    return CudaRunner(config, rank, progress=progress)
