"""The plan of a group: memory of its ranks, and the tokens and sequences that then fit.

Knows the bytes of each rank; knows nothing of how they come about (`memory`). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arriero.cluster.planner.catalog import Device, NamedModel
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.drafter_bytes import DrafterBytes
from arriero.cluster.planner.rank_weights import RankWeights
from arriero.cluster.planner.weight_forms import Weights
from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.registry import Kernels
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.kv.paging import SeenBlocks
from arriero.shards.layout.families import attention_chunk
from arriero.shards.layout.parts import AnyPart
from arriero.shards.layout.resolve import KvRoom, num_kv_blocks

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
        drafter: bytes of the model that drafts; a block of the pool for all tokens has keys and
            values of the drafter's layers too.
        kv_pool_bytes: bytes of the KV cache, the drafter's layers included.
        activations, graphs, communication, spare_experts, reserve: see `memory`.
        memory_bytes: bytes of the device.
    """

    part: AnyPart
    weights: RankWeights
    drafter: DrafterBytes
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
    def weights_nbytes(self) -> int:
        """Bytes of all weights, the drafter's included, as a slice reports them."""
        return self.weights.total + self.drafter.weights

    @property
    def fixed(self) -> int:
        """Bytes of everything except the KV pool."""
        return (
            self.weights_nbytes
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
    def kv_full_block(self) -> int:
        """Bytes of a block of the pool for all tokens, the drafter's layers included."""
        return self.kv_global_block + self.drafter.kv_block

    @property
    def kv_block(self) -> int:
        """Bytes of a block over all layers, the drafter's included."""
        return self.kv_full_block + self.kv_local_block


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

    def drafter_pool_bytes(self, rank: RankPlan) -> int:
        """Bytes of a rank's pool in the drafter's layers."""
        if not rank.drafter.kv_block:
            return 0
        if not self.chunk:
            return rank.kv_pool_bytes // rank.kv_block * rank.drafter.kv_block
        num_blocks = self.demand.num_blocks
        if num_blocks is None:
            num_blocks = 0 if self.shortfall() else self.kv_blocks()[0]
        scratch = SCRATCH_BLOCKS if self.device.cuda else 0
        return (num_blocks + scratch) * rank.drafter.kv_block

    def kv_room(self, rank: RankPlan) -> KvRoom:
        """Memory of a rank's device for the blocks that sequences use."""
        return KvRoom(
            nbytes=max(0, rank.room - self._scratch(rank)),
            full=rank.kv_full_block,
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
        return blocks * rank.kv_full_block + local_blocks * rank.kv_local_block

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
            if self.chunk and blocks > chunk_blocks and rank.kv_full_block:
                blocks = (pool - chunk_blocks * rank.kv_local_block) // rank.kv_full_block
            elif self.chunk and not rank.kv_full_block:
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
            f"weights {_gb(worst.weights_nbytes)}, activations {_gb(worst.activations)}, other "
            f"{_gb(worst.fixed - worst.weights_nbytes - worst.activations)} and KV of one sequence "
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
