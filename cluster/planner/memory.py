"""Bytes of each rank of a layout, and the number of tokens and sequences that then fit.

Weights and KV blocks are exact: the sizes that the runner allocates. Activations, CUDA graphs and
communication buffers are the upper estimates of `step_memory`. Needs no torch. Knows the memory of
a layout; knows nothing of the choice among layouts and of the output for users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from arriero.cluster.planner.catalog import Device, NamedModel
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.rank_weights import RankWeights, Weights, rank_weights
from arriero.cluster.planner.step_memory import (
    GRAPH_BYTES_PER_LAYER,
    activation_bytes,
    communication_bytes,
    num_graphs,
    split_bytes,
)
from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.packing import KV_ITEMSIZE, PLAIN, Kernels, kv_block_nbytes
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError
from arriero.shards.kv.paging import SeenBlocks
from arriero.shards.layout.dense import Span
from arriero.shards.layout.families import attention_chunk, local_layers, parts_of
from arriero.shards.layout.parts import AnyModel, AnyPart
from arriero.shards.layout.resolve import KvRoom, num_kv_blocks

MAX_RANKS = 4096
"""Largest number of ranks of a group; a plan for more ranks would take minutes."""
RESERVE_SHARE = 0.03
"""Share of the device's memory that stays free for fragmentation and errors of the estimates."""
SCRATCH_BLOCKS = 1
"""KV blocks that a rank on a GPU has besides: the padding rows of a graph write there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """The memory of a rank, in bytes.

    Attributes:
        part: the rank's part of the model.
        weights: weights by kind, and scales.
        kv_global_block, kv_local_block: bytes of a block over the layers that attend to the whole
            context, and over the layers that attend within a chunk (freed as chunks pass).
        kv_pool_bytes: bytes of the KV cache.
        activations, graphs, communication, spare_experts, reserve: see the module.
        memory_bytes: bytes of the device.
    """

    part: AnyPart
    weights: RankWeights
    kv_global_block: int
    kv_local_block: int
    kv_pool_bytes: int
    activations: int
    graphs: int
    communication: int
    spare_experts: int
    reserve: int
    memory_bytes: int

    @property
    def fixed(self) -> int:
        """Bytes of everything except the KV pool."""
        return (
            self.weights.total
            + self.activations
            + self.graphs
            + self.communication
            + self.spare_experts
            + self.reserve
        )

    @property
    def room(self) -> int:
        """Bytes left beside the fixed parts; negative where the fixed parts do not fit."""
        return self.memory_bytes - self.fixed

    @property
    def unused(self) -> int:
        """Bytes without any use."""
        return self.room - self.kv_pool_bytes

    @property
    def kv_block(self) -> int:
        """Bytes of a block over all layers."""
        return self.kv_global_block + self.kv_local_block


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """All ranks of a group.

    Attributes:
        model, weights, layout, demand, device, kernels: input of the plan.
        ranks: plans of the ranks, in rank order.
    """

    model: NamedModel
    weights: Weights
    layout: ParallelConfig
    demand: KvDemand
    device: Device
    kernels: Kernels
    ranks: tuple[RankPlan, ...]

    @property
    def chunk(self) -> int:
        """Tokens of an attention chunk; 0 for a model without chunks."""
        return attention_chunk(self.model.config)

    def pool_bytes(self, rank: RankPlan) -> int:
        """Bytes of a rank's pool that sequences can use."""
        return max(0, rank.kv_pool_bytes - self._scratch(rank))

    def kv_room(self, rank: RankPlan) -> KvRoom:
        """Memory of a rank's device for the blocks that sequences use."""
        return KvRoom(
            nbytes=max(0, rank.room - self._scratch(rank)),
            full=rank.kv_global_block,
            local=rank.kv_local_block,
        )

    def kv_blocks(self, rooms: Sequence[KvRoom] | None = None) -> tuple[int, int]:
        """Number of blocks of both pools, as the engine divides the memory left on the devices.

        Args:
            rooms: memory for blocks by rank; None takes the plan's values.

        Returns:
            Blocks of the pool for all tokens, and of the chunk-local pool, of each dp rank.

        Raises:
            SpecError: a device has no room for a block.
        """
        demand = self.demand
        config = GroupConfig(
            model_path="",
            block_size=demand.block_size,
            num_local_blocks=demand.num_local_blocks,
            max_sequences=demand.max_sequences,
        )
        rooms = [self.kv_room(rank) for rank in self.ranks] if rooms is None else rooms
        return num_kv_blocks(config, self.chunk, demand.context, rooms, whole=True)

    @property
    def seen_blocks(self) -> SeenBlocks:
        """Blocks of a sequence in layers that attend to a part of the context; the engine rule."""
        window, sinks = self.demand.sliding_window or 0, self.demand.attention_sinks
        mask = AttentionMaskSpec(chunk_size=self.chunk, window=window, sinks=sinks)
        return SeenBlocks(mask, self.demand.block_size)

    def sequence_bytes(self, rank: RankPlan, context: int) -> int:
        """KV bytes of a sequence of `context` tokens on a rank, in whole blocks."""
        local_blocks = self.seen_blocks.most(context)
        if not self.chunk:
            return local_blocks * rank.kv_block
        blocks = -(-context // self.demand.block_size)
        return blocks * rank.kv_global_block + local_blocks * rank.kv_local_block

    def concurrency(self, context: int) -> int:
        """Number of sequences of `context` tokens for which the group's pool has room at once."""
        sequences = min(
            (self.pool_bytes(rank) - self._step_bytes(rank, context))
            // self.sequence_bytes(rank, context)
            for rank in self.ranks
        )
        return max(sequences, self._fits_a_sequence(context)) * self.layout.dp

    def _step_bytes(self, rank: RankPlan, context: int) -> int:
        """Bytes for the tokens of a step outside the windows, until the step has ended."""
        if self.demand.sliding_window is None:
            return 0
        step = min(self.demand.max_batch_tokens, context)
        blocks = self.seen_blocks.most(context, step) - self.seen_blocks.most(context)
        return blocks * rank.kv_block

    def _fits_a_sequence(self, context: int) -> bool:
        """Whether a single sequence has room, in steps that may be short."""
        return all(
            self.pool_bytes(rank) >= self.sequence_bytes(rank, context) for rank in self.ranks
        )

    @property
    def pool_tokens(self) -> int:
        """Tokens for which the group's pool has room, as a long sequence on each dp rank."""
        size, chunk_blocks = self.demand.block_size, -(-self.chunk // self.demand.block_size)
        blocks_by_rank = []
        for rank in self.ranks:
            pool = self.pool_bytes(rank)
            blocks = pool // rank.kv_block
            if self.chunk and blocks > chunk_blocks and rank.kv_global_block:
                blocks = (pool - chunk_blocks * rank.kv_local_block) // rank.kv_global_block
            elif self.chunk and not rank.kv_global_block:
                continue
            blocks_by_rank.append(blocks)
        return min(blocks_by_rank) * size * self.layout.dp if blocks_by_rank else 0

    def shortfall(self) -> str | None:
        """Reason against the layout: rank and missing bytes; None where the group fits."""
        missing_bytes = self.missing_bytes()
        if not missing_bytes:
            return None
        worst = self.fullest
        need = self.sequence_bytes(worst, self.demand.context)
        return (
            f"rank {worst.part.rank} (stage {worst.part.stage}) is {_gb(missing_bytes)} short: "
            f"weights {_gb(worst.weights.total)}, activations {_gb(worst.activations)}, other "
            f"{_gb(worst.fixed - worst.weights.total - worst.activations)} and KV of one sequence "
            f"of {self.demand.context} tokens {_gb(need)} exceed the "
            f"{_gb(worst.memory_bytes)} of {self.device.name}"
        )

    @property
    def fullest(self) -> RankPlan:
        """The rank with the least free memory beside a sequence."""
        return min(self.ranks, key=self._free_bytes)

    def missing_bytes(self) -> int:
        """Bytes that the fullest rank is short of; 0 where the group fits."""
        return max(0, -min(self._free_bytes(rank) for rank in self.ranks))

    def _free_bytes(self, rank: RankPlan) -> int:
        """Free bytes of a rank beside a sequence; negative where the sequence does not fit."""
        need = self.sequence_bytes(rank, self.demand.context) + self._scratch(rank)
        free = rank.room - need
        if self.demand.kv_bytes is None and self.demand.num_blocks is None:
            return free
        return min(free, rank.kv_pool_bytes - need, rank.unused)

    def _scratch(self, rank: RankPlan) -> int:
        return SCRATCH_BLOCKS * rank.kv_block if self.device.cuda else 0


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


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


def _rank(
    config: AnyModel,
    part: AnyPart,
    weights: RankWeights,
    layout: ParallelConfig,
    demand: KvDemand,
    device: Device,
    kernels: Kernels,
    base: int,
) -> RankPlan:
    if demand.kv_dtype not in KV_ITEMSIZE:
        raise SpecError(f"`kv_dtype`={demand.kv_dtype!r} is none of {', '.join(KV_ITEMSIZE)}")
    layer_block_bytes = kv_block_nbytes(
        kernels,
        kv_heads=part.kv_heads.size,
        head_dim=config.head_dim,
        block_size=demand.block_size,
        dtype=demand.kv_dtype,
    )
    num_layers, local = part.layers.size, local_layers(config, part)
    itemsize = base if device.cuda else 4
    activations = activation_bytes(config, part, layout, demand, itemsize)
    graphs = 0
    if device.cuda:
        activations += split_bytes(config, part, demand)
        share = min(1.0, demand.max_sequences / demand.max_batch_tokens)
        nodes = num_graphs(demand.max_sequences) * num_layers * GRAPH_BYTES_PER_LAYER
        graphs = int(activations * share) + nodes
    reserve = demand.reserve_bytes
    if reserve is None:
        reserve = device.context_bytes + int(device.memory_bytes * RESERVE_SHARE)
    return RankPlan(
        part=part,
        weights=weights,
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
        num_blocks = demand.kv_bytes // sum(rank.kv_block for rank in ranks)
    else:
        num_blocks = max(0, min(rank.room // rank.kv_block for rank in ranks)) - scratch
    return [
        (num_blocks + scratch) * rank.kv_global_block + (num_local + scratch) * rank.kv_local_block
        for rank in ranks
    ]
