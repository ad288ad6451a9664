"""Bytes of the slots for adapters on a rank, to the byte as the slices allocate them.

Knows settings and parts; knows nothing of the rest of a rank's memory. Needs no torch, unless a
group lists adapters: their files say which modules they change, and at which rank.
"""

from __future__ import annotations

from arriero.kernels.sizes import PLAIN
from arriero.shards.adapters.bank_plan import (
    adapted_modules,
    plan_banks,
    planned_nbytes,
    slot_modules,
)
from arriero.shards.config.group import GroupConfig
from arriero.shards.families.registry import family_of
from arriero.shards.layout.parts import AnyModel, AnyPart


def adapter_bytes(config: GroupConfig, model: AnyModel, part: AnyPart) -> int:
    """Bytes of a rank's slots for adapters; 0 in a group without adapters.

    Raises:
        CheckpointError: a listed adapter does not fit the model.
    """
    slots = config.adapter_slots
    if slots is None and not config.adapters:
        return 0
    listed: set[str] = set()
    max_rank = 0
    if config.adapters:
        from arriero.shards.adapters.adapter import open_adapters

        adapters = open_adapters(config, model)
        listed = {name for adapter in adapters for name in adapter.names}
        max_rank = max(adapter.rank for adapter in adapters)
    modules = adapted_modules(family_of(model).modules(model, True))
    # adapters have the dtype of bfloat16 models, and float32 beside other weights
    itemsize = PLAIN["bfloat16" if config.dtype == "bfloat16" else "float32"]
    if slots is None:
        plans = plan_banks(modules, part, listed)
        return planned_nbytes(plans, len(config.adapters), max_rank, itemsize)
    plans = plan_banks(modules, part, slot_modules(modules, listed))
    return planned_nbytes(plans, slots.device, slots.max_rank, itemsize)
