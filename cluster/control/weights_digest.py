"""The digest of a model's weights, computed in a Ray task of its own.

The task keeps torch out of the operator's process. Knows checkpoints and model settings; knows
nothing of revisions.
"""

from __future__ import annotations

from typing import Any

import ray

from arriero.cluster.spec.model import ModelSpec
from arriero.shards.errors import ArrieroError


async def weights_digest(model: ModelSpec, *, check: bool = True) -> str:
    """The digest of a model's weights.

    Args:
        model: settings of the model.
        check: also check that a group and a gateway can use the folder with these settings.

    Raises:
        CheckpointError: the weights cannot be read; with `check`, a group or a gateway could
            not use the folder.
        SpecError: with `check`, the settings do not fit the model.
    """
    task: Any = ray.remote(_digest)
    settings = model.model_dump(mode="json") if check else None
    try:
        return str(await task.options(num_cpus=0).remote(model.path, settings))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ArrieroError):
            raise error.cause from None
        raise


def _digest(path: str, settings: dict[str, Any] | None) -> str:
    from arriero.cluster.planner.model_check import check_checkpoint
    from arriero.shards.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(path)
    if settings is not None:
        check_checkpoint(checkpoint, ModelSpec.model_validate(settings))
    return checkpoint.digest
