"""The KV pool of a group on GPUs that names no size: what its devices leave, by the planner.

Knows plans and settings of groups; knows nothing of how the free memory was learnt. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from arriero.cluster.planner.catalog import Device, NamedModel
from arriero.cluster.planner.memory import GroupPlan, KvDemand, Layout, plan_group
from arriero.cluster.planner.rank_weights import DTYPES, ON_LOAD, Dtype, weights_as
from arriero.kernels.packing import KERNELS, Kernels
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import SpecError
from arriero.shards.layout.parts import AnyModel


def needs_room(config: GroupConfig) -> bool:
    """Whether a group's KV pool is to be sized by what its devices leave."""
    return config.device == "cuda" and config.kv_bytes is None and config.num_blocks is None


def sized(
    config: GroupConfig, model: AnyModel, scheme: QuantScheme | None, free_bytes: Sequence[int]
) -> GroupConfig:
    """Fill in `num_blocks` and, where there are chunk-local layers, `num_local_blocks`.

    Args:
        config: of the group, without a size.
        model: its numbers.
        scheme: how its checkpoint is quantized; None for plain weights.
        free_bytes: of each rank's device, before anything of the group is on it but its context.

    Raises:
        SpecError: a device leaves no room for a block; or see `plan_group`.
    """
    plans = {free: _plan(config, model, scheme, free) for free in set(free_bytes)}
    ranked = [(plans[free], plans[free].ranks[rank]) for rank, free in enumerate(free_bytes)]
    rooms = [plan.kv_room(rank) for plan, rank in ranked]
    for plan, rank in ranked:
        if plan.kv_room(rank).nbytes < rank.kv_block:
            raise SpecError(
                f"rank {rank.part.rank}: weights of {rank.weights.total} bytes and "
                f"{rank.fixed - rank.weights.total} for a step, graphs and reserve leave no KV "
                f"block of {rank.kv_block} in the {rank.memory_bytes} bytes that are free on its "
                "GPU; use more slices, quantize, or lower `max_batch_tokens`"
            )
    num_blocks, num_local = ranked[0][0].kv_blocks(rooms)
    return replace(config, num_blocks=num_blocks, num_local_blocks=num_local or None)


def stored_as(dtype: str, quantization: str | None, scheme: QuantScheme | None) -> Dtype:
    """The planner's name for what a group keeps its weights as.

    Args:
        dtype: of the group.
        quantization: of its weights while they load.
        scheme: of its checkpoint.
    """
    if quantization is not None:
        return ON_LOAD[quantization]
    if scheme is not None:
        return "checkpoint"
    return next(one for one in DTYPES if one == dtype)


def _plan(
    config: GroupConfig, model: AnyModel, scheme: QuantScheme | None, free_bytes: int
) -> GroupPlan:
    layout = Layout(
        tp=config.tp,
        pp=config.pp,
        dp=config.dp,
        ep=config.ep,
        tp_shares=config.tp_shares,
        layer_split=config.layer_split,
    )
    demand = KvDemand(
        context=config.max_model_len or model.max_position_embeddings,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        block_size=config.block_size,
        num_local_blocks=config.num_local_blocks,
        kv_dtype=config.dtype,
        spare_experts=config.spare_experts,
        sliding_window=config.sliding_window,
        attention_sinks=config.attention_sinks,
    )
    # what is free is after the context, and the backend itself refuses what it cannot multiply
    device = Device(name="cuda", memory_bytes=free_bytes, bandwidth=1.0, context_bytes=0)
    kernels: Kernels = next((one for one in KERNELS if one == config.kernels), "triton")
    dtype = stored_as(config.dtype, config.quantization, scheme)
    weights = weights_as(model, scheme, dtype)
    return plan_group(
        NamedModel(name=config.model_path, config=model, scheme=scheme),
        weights,
        layout,
        demand,
        device,
        kernels,
    )
