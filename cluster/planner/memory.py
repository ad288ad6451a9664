"""Bytes of each rank of a layout.

Weights and KV blocks are exact: the sizes that the runner allocates. Activations, CUDA graphs and
communication buffers are the upper estimates of `step_memory`. Needs no torch. Knows the memory of
a layout; knows nothing of the choice among layouts and of the output for users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from arriero.cluster.planner.catalog import Device, NamedModel
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.drafter_bytes import NOTHING, DrafterBytes, KvForm
from arriero.cluster.planner.group_plan import SCRATCH_BLOCKS, GroupPlan, RankPlan
from arriero.cluster.planner.rank_weights import RankWeights, rank_weights
from arriero.cluster.planner.step_memory import (
    DRAFT_ROWS,
    GRAPH_BYTES_PER_LAYER,
    activation_bytes,
    communication_bytes,
    num_graphs,
    split_bytes,
)
from arriero.cluster.planner.weight_forms import Weights
from arriero.kernels.registry import BACKENDS, Kernels
from arriero.kernels.sizes import KV_ITEMSIZE, PLAIN, KvBlockSize
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError
from arriero.shards.layout.dense import Span
from arriero.shards.layout.families import attention_chunk, local_layers, parts_of
from arriero.shards.layout.parts import AnyModel, AnyPart
from arriero.shards.layout.resolve import KvRoom, num_kv_blocks

MAX_RANKS = 4096
"""Largest number of ranks of a group; a plan for more ranks would take minutes."""
RESERVE_SHARE = 0.03
"""Share of the device's memory that stays free for fragmentation and errors of the estimates."""


def plan_group(
    model: NamedModel,
    weights: Weights,
    layout: ParallelConfig,
    demand: KvDemand,
    device: Device,
    kernels: Kernels,
) -> GroupPlan:
    """The memory of all ranks in a layout, whether or not the group fits.

    Raises:
        SpecError: the layout cannot divide the model, or the demand exceeds the model's limits.
    """
    config = model.config
    limit = config.max_position_embeddings
    if not 1 <= demand.context <= limit:
        raise SpecError(
            f"`context`={demand.context} must be 1 to {limit}, the model's position limit"
        )
    if weights.precision == "fp8" and not device.fp8 and device.cuda:
        raise SpecError(
            f"`dtype`={weights.dtype} needs compute capability 8.9 or newer; {device.name} is "
            "older; use int8 or int4"
        )
    if layout.world_size > MAX_RANKS:
        raise SpecError(f"{layout} has {layout.world_size} ranks; plan at most {MAX_RANKS}")
    parts = parts_of(config, layout)
    sizes_by_rank = [_sizes(part) for part in parts]
    # Ranks with equal sizes have equal bytes: a group of 64 ranks has few different sizes.
    weights_by_sizes = {
        sizes: rank_weights(config, part, weights, kernels)
        for sizes, part in dict(zip(sizes_by_rank, parts, strict=True)).items()
    }
    ranks = [
        _rank(
            config,
            part,
            weights_by_sizes[sizes],
            _drafter(part, layout, demand, kernels),
            layout,
            demand,
            device,
            kernels,
            PLAIN[weights.base],
        )
        for part, sizes in zip(parts, sizes_by_rank, strict=True)
    ]
    pools = _pools(ranks, demand, config, device)
    return GroupPlan(
        model=model,
        weights=weights,
        layout=layout,
        demand=demand,
        device=device,
        kernels=kernels,
        ranks=tuple(
            replace(rank, kv_pool_bytes=pool) for rank, pool in zip(ranks, pools, strict=True)
        ),
    )


def _sizes(part: AnyPart) -> tuple[object, ...]:
    """The sizes of a part that decide the bytes of the weights."""
    ranks = ("rank", "dp_rank", "tp_rank", "ep_rank", "stage")
    values = [getattr(part, field.name) for field in fields(part) if field.name not in ranks]
    sizes = (value.size if isinstance(value, Span) else value for value in values)
    return (part.layers, part.tp_rank == 0, *sizes)


def _drafter(
    part: AnyPart, layout: ParallelConfig, demand: KvDemand, kernels: Kernels
) -> DrafterBytes:
    if demand.drafter is None:
        return NOTHING
    form = KvForm(block_size=demand.block_size, dtype=demand.kv_dtype, kernels=kernels)
    return demand.drafter.on_rank(part, layout, form)


def _rank(
    config: AnyModel,
    part: AnyPart,
    weights: RankWeights,
    drafter: DrafterBytes,
    layout: ParallelConfig,
    demand: KvDemand,
    device: Device,
    kernels: Kernels,
    base: int,
) -> RankPlan:
    if demand.kv_dtype not in KV_ITEMSIZE:
        raise SpecError(f"`kv_dtype`={demand.kv_dtype!r} is none of {', '.join(KV_ITEMSIZE)}")
    layer_block_bytes = BACKENDS[kernels].kv_block_nbytes(
        KvBlockSize(
            kv_heads=part.kv_heads.size,
            head_dim=config.head_dim,
            block_size=demand.block_size,
            dtype=demand.kv_dtype,
        )
    )
    num_layers, local = part.layers.size, local_layers(config, part)
    itemsize = base if device.cuda else 4
    activations = activation_bytes(config, part, layout, demand, itemsize)
    graphs = 0
    if device.cuda:
        activations += split_bytes(config, part, demand)
    if device.cuda and demand.drafter is None:  # steps with a drafter run op by op
        share = min(1.0, demand.max_sequences / demand.max_batch_tokens)
        nodes = (
            num_graphs(max(demand.max_sequences, DRAFT_ROWS)) * num_layers * GRAPH_BYTES_PER_LAYER
        )
        graphs = int(activations * share) + nodes
    reserve = demand.reserve_bytes
    if reserve is None:
        reserve = device.context_bytes + int(device.memory_bytes * RESERVE_SHARE)
    return RankPlan(
        part=part,
        weights=weights,
        drafter=drafter,
        kv_global_block=layer_block_bytes * (num_layers - local),
        kv_local_block=layer_block_bytes * local,
        kv_pool_bytes=0,
        activations=activations,
        graphs=graphs,
        communication=communication_bytes(config, part, layout, demand, itemsize, device),
        spare_experts=demand.spare_experts * weights.expert_bytes,
        reserve=reserve,
        memory_bytes=device.memory_bytes,
    )


def _pools(
    ranks: Sequence[RankPlan], demand: KvDemand, model: AnyModel, device: Device
) -> list[int]:
    """Pool bytes of each rank: the leader gives every rank the same number of blocks."""
    scratch = SCRATCH_BLOCKS if device.cuda else 0
    chunk = attention_chunk(model)
    num_local = 0
    if chunk:
        if demand.num_blocks is None and demand.kv_bytes is None:
            # Two pools of different numbers of blocks: each rank gives all memory that is left.
            return [max(0, rank.room) for rank in ranks]
        config = GroupConfig(
            model_path="",
            block_size=demand.block_size,
            kv_bytes=demand.kv_bytes,
            num_blocks=demand.num_blocks,
            num_local_blocks=demand.num_local_blocks,
            max_sequences=demand.max_sequences,
        )
        whole = KvRoom(
            nbytes=demand.kv_bytes or 0,
            full=sum(rank.kv_global_block for rank in ranks),
            local=sum(rank.kv_local_block for rank in ranks),
        )
        num_blocks, num_local = num_kv_blocks(config, chunk, demand.context, [whole])
    elif demand.num_blocks is not None:
        num_blocks = demand.num_blocks
    elif demand.kv_bytes is not None:
        # as the leader divides the bytes: over the layers of the model, without the drafter's
        num_blocks = demand.kv_bytes // sum(rank.kv_global_block for rank in ranks)
    else:
        num_blocks = max(0, min(rank.room // rank.kv_block for rank in ranks)) - scratch
    return [
        (num_blocks + scratch) * rank.kv_full_block + (num_local + scratch) * rank.kv_local_block
        for rank in ranks
    ]
