"""Size of a GPU group's KV pool where the settings give none: all memory that is left.

The planner computes the memory left on each device. Knows plans and settings of groups; knows
nothing of the way the free memory was measured. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from arriero.cluster.planner.adapter_bytes import adapter_bytes
from arriero.cluster.planner.catalog import Device, NamedModel
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.drafter_bytes import read_drafter
from arriero.cluster.planner.group_plan import GroupPlan
from arriero.cluster.planner.memory import plan_group
from arriero.cluster.planner.weight_forms import stored_as, weights_as
from arriero.kernels.registry import BACKENDS
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import SpecError
from arriero.shards.layout.families import parts_of
from arriero.shards.layout.parts import AnyModel


def needs_room(config: GroupConfig) -> bool:
    """Whether the memory left on the devices decides the size of a group's KV pool."""
    return config.device == "cuda" and config.kv_bytes is None and config.num_blocks is None


def with_kv_blocks(
    config: GroupConfig, model: AnyModel, scheme: QuantScheme | None, free_bytes: Sequence[int]
) -> GroupConfig:
    """Fill in `num_blocks` and, where there are chunk-local layers, `num_local_blocks`.

    Args:
        config: settings of the group, without a pool size.
        model: sizes of the model.
        scheme: quantization of the checkpoint; None for plain weights.
        free_bytes: free bytes of each rank's device, when only the context of the group is there.

    Raises:
        SpecError: a device has no room for a block; or see `plan_group`.
    """
    parts = parts_of(model, config)
    slots = [adapter_bytes(config, model, part) for part in parts]
    free_bytes = [free - nbytes for free, nbytes in zip(free_bytes, slots, strict=True)]
    plans = {free: _plan(config, model, scheme, free) for free in set(free_bytes)}
    ranked = [(plans[free], plans[free].ranks[rank]) for rank, free in enumerate(free_bytes)]
    rooms = [plan.kv_room(rank) for plan, rank in ranked]
    for plan, rank in ranked:
        if plan.kv_room(rank).nbytes < rank.kv_block:
            raise SpecError(
                f"rank {rank.part.rank}: weights of {rank.weights_nbytes} bytes and "
                f"{rank.fixed - rank.weights_nbytes} bytes for a step, graphs and reserve leave no "
                f"KV block of {rank.kv_block} bytes in the {rank.memory_bytes} free bytes of its "
                "GPU; use more slices, quantize, or lower `max_batch_tokens`"
            )
    num_blocks, num_local = ranked[0][0].kv_blocks(rooms)
    return replace(config, num_blocks=num_blocks, num_local_blocks=num_local or None)


def _plan(
    config: GroupConfig, model: AnyModel, scheme: QuantScheme | None, free_bytes: int
) -> GroupPlan:
    demand = KvDemand(
        context=config.max_model_len or model.max_position_embeddings,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        block_size=config.block_size,
        num_local_blocks=config.num_local_blocks,
        kv_dtype=config.cache_dtype,
        spare_experts=config.spare_experts,
        sliding_window=config.sliding_window,
        attention_sinks=config.attention_sinks,
        drafter=read_drafter(config, model),
    )
    # The free bytes exclude the context already; a backend itself refuses unknown precisions.
    device = Device(name="cuda", memory_bytes=free_bytes, bandwidth=1.0, context_bytes=0)
    kernels = config.kernels if config.kernels in BACKENDS else "triton"
    dtype = stored_as(config.dtype, config.quantization, scheme)
    weights = weights_as(model, scheme, dtype)
    return plan_group(
        NamedModel(name=config.model_path, config=model, scheme=scheme),
        weights,
        config,
        demand,
        device,
        kernels,
    )
