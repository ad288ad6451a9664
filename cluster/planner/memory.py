"""What each rank of one layout holds, in bytes, and what then fits.

Weights and KV blocks are exact: the sizes that the runner allocates. Activations, CUDA graphs and
communication buffers are upper estimates by the formulas here. Needs no torch; knows nothing of
how layouts are chosen or shown.

Shape legend: T tokens of a step, H hidden size, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from arriero.cluster.planner.catalog import Device, NamedModel
from arriero.cluster.planner.rank_weights import RankWeights, Weights, rank_weights
from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.packing import KV_ITEMSIZE, PLAIN, Kernels, kv_block_nbytes
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import SpecError
from arriero.shards.kv.paging import SeenBlocks
from arriero.shards.layout.dense import Span
from arriero.shards.layout.families import attention_chunk, local_layers, parts_of
from arriero.shards.layout.moe import MoEPart
from arriero.shards.layout.parts import AnyModel, AnyPart
from arriero.shards.layout.resolve import KvRoom, num_kv_blocks
from arriero.shards.model_config.llama4 import Llama4Config

MAX_RANKS = 4096
"""Of a group; beyond it a plan would take minutes."""
RESERVE_SHARE = 0.03
"""Of the device's memory, left for fragmentation and for what the estimates miss."""
SCRATCH_BLOCKS = 1
"""On a GPU a rank keeps one KV block more, where a graph's padding rows write."""
GRAPH_BYTES_PER_LAYER = 64 << 10
"""Of one graph: the nodes of a layer's kernels."""
CHANNEL_BYTES = 128 << 20
"""Of one NCCL communicator: its channels' buffers."""
_MOST_TILES = 17  # of one image: 16 and the whole
SAMPLING_COPIES = 3
"""Logits of the sampled rows live so many times over: raw, sorted, probabilities."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a group cuts its model.

    Attributes:
        tp, pp: tensor-parallel slices of a stage, and stages.
        dp: data-parallel attention ranks; 1 for a dense model.
        ep: parts that experts are dealt to; None for a dense model, or for tp * dp.
        tp_shares, layer_split: as in `GroupConfig`.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int | None = None
    tp_shares: tuple[float, ...] | None = None
    layer_split: tuple[int, ...] | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the group."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        text = f"TP{self.tp}"
        if self.dp > 1:
            text += f"xDP{self.dp}"
        if self.pp > 1:
            text += f"xPP{self.pp}"
        if self.ep is not None:
            text += f" EP{self.ep}"
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class KvDemand:
    """What the group is to serve.

    Attributes:
        context: tokens of a sequence that must fit at least once.
        max_sequences: running at once, on each data-parallel rank.
        max_batch_tokens: of a step.
        block_size: tokens of a KV block.
        kv_dtype: of the cache.
        kv_bytes: of the whole group's pool; None takes what is left.
        num_blocks: outright, instead of `kv_bytes`; of each dp rank.
        num_local_blocks: likewise, of the chunk-local pool.
        spare_experts: second copies of hot experts that a rank keeps in each routed layer.
        sliding_window, attention_sinks: as in `GroupConfig`; whether the model may have them is
            the leader's to say.
        reserve_bytes: None takes the device's context and `RESERVE_SHARE` of its memory.
    """

    context: int
    max_sequences: int = 256
    max_batch_tokens: int = 2048
    block_size: int = 16
    kv_dtype: str = "bfloat16"
    kv_bytes: int | None = None
    num_blocks: int | None = None
    num_local_blocks: int | None = None
    spare_experts: int = 0
    sliding_window: int | None = None
    attention_sinks: int = 0
    reserve_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """One rank's memory, in bytes.

    Attributes:
        part: what it holds of the model.
        weights: by kind, and their scales.
        kv_global_block, kv_local_block: of a block over the layers that see the whole context,
            and over those that see their chunk only (freed as chunks pass).
        kv_pool_bytes: what the cache gets.
        activations, graphs, communication, spare_experts, reserve: see the module.
        memory_bytes: of the device.
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
        """All but the KV pool."""
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
        """What the fixed parts leave; negative where they do not fit."""
        return self.memory_bytes - self.fixed

    @property
    def unused(self) -> int:
        """What nothing asked for."""
        return self.room - self.kv_pool_bytes

    @property
    def kv_block(self) -> int:
        """Bytes of a block over all layers."""
        return self.kv_global_block + self.kv_local_block


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """All ranks of one group.

    Attributes:
        model, weights, layout, demand, device, kernels: what was planned.
        ranks: in rank order.
    """

    model: NamedModel
    weights: Weights
    layout: Layout
    demand: KvDemand
    device: Device
    kernels: Kernels
    ranks: tuple[RankPlan, ...]

    @property
    def chunk(self) -> int:
        """Tokens of an attention chunk; 0 for none."""
        return attention_chunk(self.model.config)

    def pool_bytes(self, rank: RankPlan) -> int:
        """Bytes of a rank's pool that sequences can use."""
        return max(0, rank.kv_pool_bytes - self._scratch(rank))

    def kv_room(self, rank: RankPlan) -> KvRoom:
        """What a rank's device leaves for the blocks that sequences use."""
        return KvRoom(
            nbytes=max(0, rank.room - self._scratch(rank)),
            full=rank.kv_global_block,
            local=rank.kv_local_block,
        )

    def kv_blocks(self, rooms: Sequence[KvRoom] | None = None) -> tuple[int, int]:
        """Blocks of both pools, as the engine divides what the devices leave.

        Args:
            rooms: by rank; None for the plan's own.

        Returns:
            Of the pool for all tokens, and of the chunk-local one; of each dp rank.

        Raises:
            SpecError: a device leaves no room for a block.
        """
        demand = self.demand
        asked = GroupConfig(
            model_path="",
            block_size=demand.block_size,
            num_local_blocks=demand.num_local_blocks,
            max_sequences=demand.max_sequences,
        )
        rooms = [self.kv_room(rank) for rank in self.ranks] if rooms is None else rooms
        return num_kv_blocks(asked, self.chunk, demand.context, rooms, whole=True)

    @property
    def seen(self) -> SeenBlocks:
        """Which blocks a sequence holds in layers that see a part; the engine's own rule."""
        window, sinks = self.demand.sliding_window or 0, self.demand.attention_sinks
        visible = AttentionMaskSpec(chunk_size=self.chunk, window=window, sinks=sinks)
        return SeenBlocks(visible, self.demand.block_size)

    def sequence_bytes(self, rank: RankPlan, context: int) -> int:
        """KV bytes that one sequence of `context` tokens takes on a rank, whole blocks."""
        some = self.seen.most(context)
        if not self.chunk:
            return some * rank.kv_block
        blocks = -(-context // self.demand.block_size)
        return blocks * rank.kv_global_block + some * rank.kv_local_block

    def concurrency(self, context: int) -> int:
        """Sequences of `context` tokens that the group's pool holds at once."""
        held = min(
            (self.pool_bytes(rank) - self._step_bytes(rank, context))
            // self.sequence_bytes(rank, context)
            for rank in self.ranks
        )
        return max(held, self._holds_one(context)) * self.layout.dp

    def _step_bytes(self, rank: RankPlan, context: int) -> int:
        """What the tokens of a step take beside windows, until they have passed through them."""
        if self.demand.sliding_window is None:
            return 0
        step = min(self.demand.max_batch_tokens, context)
        return (self.seen.most(context, step) - self.seen.most(context)) * rank.kv_block

    def _holds_one(self, context: int) -> bool:
        """Whether one sequence has room, in steps as short as that takes."""
        return all(
            self.pool_bytes(rank) >= self.sequence_bytes(rank, context) for rank in self.ranks
        )

    @property
    def pool_tokens(self) -> int:
        """Tokens that the group's pool holds, in one long sequence for each dp rank."""
        size, chunk_blocks = self.demand.block_size, -(-self.chunk // self.demand.block_size)
        best = []
        for rank in self.ranks:
            pool = self.pool_bytes(rank)
            blocks = pool // rank.kv_block
            if self.chunk and blocks > chunk_blocks and rank.kv_global_block:
                blocks = (pool - chunk_blocks * rank.kv_local_block) // rank.kv_global_block
            elif self.chunk and not rank.kv_global_block:
                continue
            best.append(blocks)
        return min(best) * size * self.layout.dp if best else 0

    def shortfall(self) -> str | None:
        """Why it does not fit, naming the rank and what it lacks; None where it fits."""
        lacking = self.lacking()
        if not lacking:
            return None
        worst = self.fullest
        need = self.sequence_bytes(worst, self.demand.context)
        return (
            f"rank {worst.part.rank} (stage {worst.part.stage}) is {_gb(lacking)} short: weights "
            f"{_gb(worst.weights.total)}, activations {_gb(worst.activations)}, other "
            f"{_gb(worst.fixed - worst.weights.total - worst.activations)} and KV of one sequence "
            f"of {self.demand.context} tokens {_gb(need)} exceed the "
            f"{_gb(worst.memory_bytes)} of {self.device.name}"
        )

    @property
    def fullest(self) -> RankPlan:
        """The rank that has least left once one sequence is in."""
        return min(self.ranks, key=self._left)

    def lacking(self) -> int:
        """Bytes that the fullest rank is short of; 0 where it fits."""
        return max(0, -min(self._left(rank) for rank in self.ranks))

    def _left(self, rank: RankPlan) -> int:
        """What stays free once one sequence is in; negative where it does not fit."""
        need = self.sequence_bytes(rank, self.demand.context) + self._scratch(rank)
        left = rank.room - need
        if self.demand.kv_bytes is None and self.demand.num_blocks is None:
            return left
        return min(left, rank.kv_pool_bytes - need, rank.unused)

    def _scratch(self, rank: RankPlan) -> int:
        return SCRATCH_BLOCKS * rank.kv_block if self.device.cuda else 0


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def plan_group(
    model: NamedModel,
    weights: Weights,
    layout: Layout,
    demand: KvDemand,
    device: Device,
    kernels: Kernels,
) -> GroupPlan:
    """Every rank's memory under one layout, whether or not it fits.

    Raises:
        SpecError: the layout cannot cut the model, or the demand passes its limits.
    """
    config = model.config
    limit = config.max_position_embeddings
    if not 1 <= demand.context <= limit:
        raise SpecError(
            f"`context`={demand.context} must be 1 to {limit}, the model's position limit"
        )
    if weights.precision == "fp8" and not device.fp8 and device.cuda:
        raise SpecError(
            f"`dtype`={weights.dtype}: {device.name} does not multiply float8 (it needs compute "
            "capability 8.9); use int8 or int4"
        )
    if layout.world_size > MAX_RANKS:
        raise SpecError(f"{layout} has {layout.world_size} ranks; plan at most {MAX_RANKS}")
    parts = cut(config, layout)
    held = [_sizes(part) for part in parts]
    # ranks that hold like shares take like bytes: a group of 64 has a handful of kinds
    alike = {
        sizes: rank_weights(config, part, weights, kernels)
        for sizes, part in dict(zip(held, parts, strict=True)).items()
    }
    ranks = [
        _rank(
            config,
            part,
            alike[sizes],
            layout,
            demand,
            device,
            kernels,
            PLAIN[weights.base],
        )
        for part, sizes in zip(parts, held, strict=True)
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
    """What decides the bytes of a rank's weights."""
    ranks = ("rank", "dp_rank", "tp_rank", "ep_rank", "stage")
    values = [getattr(part, one.name) for one in fields(part) if one.name not in ranks]
    shares = (one.size if isinstance(one, Span) else one for one in values)
    return (part.layers, part.tp_rank == 0, *shares)


def cut(config: AnyModel, layout: Layout) -> Sequence[AnyPart]:
    """Who holds what, by the partition that the runner cuts by.

    Raises:
        SpecError: the layout does not fit the model.
    """
    return parts_of(
        config,
        GroupConfig(
            model_path="",
            tp=layout.tp,
            pp=layout.pp,
            dp=layout.dp,
            ep=layout.ep,
            tp_shares=layout.tp_shares,
            layer_split=layout.layer_split,
        ),
    )


def _rank(
    config: AnyModel,
    part: AnyPart,
    weights: RankWeights,
    layout: Layout,
    demand: KvDemand,
    device: Device,
    kernels: Kernels,
    base: int,
) -> RankPlan:
    if demand.kv_dtype not in KV_ITEMSIZE:
        raise SpecError(f"`kv_dtype`={demand.kv_dtype!r} is none of {', '.join(KV_ITEMSIZE)}")
    one_layer = kv_block_nbytes(
        kernels,
        kv_heads=part.kv_heads.size,
        head_dim=config.head_dim,
        block_size=demand.block_size,
        dtype=demand.kv_dtype,
    )
    num_layers, local = part.layers.size, local_layers(config, part)
    itemsize = base if device.cuda else 4
    activations = _activations(config, part, layout, demand, itemsize)
    graphs = 0
    if device.cuda:
        share = min(1.0, demand.max_sequences / demand.max_batch_tokens)
        nodes = num_graphs(demand.max_sequences) * num_layers * GRAPH_BYTES_PER_LAYER
        graphs = int(activations * share) + nodes
    reserve = demand.reserve_bytes
    if reserve is None:
        reserve = device.context_bytes + int(device.memory_bytes * RESERVE_SHARE)
    return RankPlan(
        part=part,
        weights=weights,
        kv_global_block=one_layer * (num_layers - local),
        kv_local_block=one_layer * local,
        kv_pool_bytes=0,
        activations=activations,
        graphs=graphs,
        communication=_communication(config, part, layout, demand, itemsize, device),
        spare_experts=demand.spare_experts * weights.expert_bytes,
        reserve=reserve,
        memory_bytes=device.memory_bytes,
    )


def _pools(
    ranks: Sequence[RankPlan], demand: KvDemand, config: AnyModel, device: Device
) -> list[int]:
    """The pool of each rank: the same number of blocks everywhere, as the leader deals them."""
    scratch = SCRATCH_BLOCKS if device.cuda else 0
    chunk = attention_chunk(config)
    num_local = 0
    if chunk:
        if demand.num_blocks is None and demand.kv_bytes is None:
            # two pools, whose blocks are of different numbers: each rank gives all that is left
            return [max(0, rank.room) for rank in ranks]
        asked = GroupConfig(
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
        num_blocks, num_local = num_kv_blocks(asked, chunk, demand.context, [whole])
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


def num_graphs(max_sequences: int) -> int:
    """CUDA graphs of a rank: a batch size each, growing by 8, 16 and 64."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_sequences:
        last = sizes[-1]
        sizes.append(last + (8 if last < 64 else 16 if last < 256 else 64))
    return sum(size < max_sequences for size in sizes) + 1


def _activations(
    config: AnyModel, part: AnyPart, layout: Layout, demand: KvDemand, itemsize: int
) -> int:
    """The most that one step holds at once: a layer's tensors, then the logits."""
    tokens, hidden, d = demand.max_batch_tokens, config.hidden_size, config.head_dim
    q, kv = part.q_heads.size * d, part.kv_heads.size * d
    attention = 2 * q + 2 * kv + q  # qkv, rotated q, output
    mlp = 3 * part.columns.size
    if isinstance(config, Llama4Config) and isinstance(part, MoEPart):
        # every token of the stage may be routed to this rank's experts: the worst case is sized
        routed = layout.dp * config.top_k * (3 * part.expert_columns.size + 2 * hidden)
        mlp = max(mlp, 3 * part.shared_columns.size + routed)
    layer = tokens * (3 * hidden + max(attention, mlp)) * itemsize  # residual, normed, partial sum
    logits = 0
    if part.last_stage:
        rows = demand.max_sequences
        logits = rows * part.vocab.size * 4 + rows * hidden * itemsize
        if part.tp_rank == 0:
            logits += SAMPLING_COPIES * rows * config.vocab_size * 4
    tables = demand.max_sequences * -(-demand.context // demand.block_size) * 4
    angles = 2 * tokens * d * 4
    vision = 0
    seen = config.vision if isinstance(config, Llama4Config) else None
    if seen is not None and isinstance(part, MoEPart) and part.first_stage:
        tile = 4 * seen.hidden_size + 3 * part.vision_columns.size
        vision = _MOST_TILES * seen.num_positions * tile * itemsize
    return max(layer + logits, vision) + tables + angles


def _communication(
    config: AnyModel, part: AnyPart, layout: Layout, demand: KvDemand, itemsize: int, device: Device
) -> int:
    """Buffers of sums, hand-over and exchange, and the library's own channels."""
    row = demand.max_batch_tokens * config.hidden_size * itemsize
    total, communicators = 0, 0
    if layout.tp > 1:
        # more than two ranks gather all parts and add them in rank order
        total += row * layout.tp if layout.tp > 2 else 0
        communicators += 1
        if part.last_stage and part.tp_rank == 0:
            total += demand.max_sequences * config.vocab_size * 4
    if layout.pp > 1:
        total += row * (1 + layout.pp)  # one received, as many on their way as micro-batches
        communicators += 1
    if isinstance(config, Llama4Config) and layout.tp * layout.dp > 1:
        total += 2 * row * layout.dp * config.top_k  # dispatch and combine
        communicators += 1
    return total + (communicators * CHANNEL_BYTES if device.cuda else 0)
