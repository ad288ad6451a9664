"""Decode steps as captured graphs: batch sizes, and the input tensors.

The launches of a graph are fixed, so a batch is padded to the next size, and all inputs of a step
lie in tensors with fixed addresses; block tables are those of `DeviceBlockTable`. Padding rows are
sequences of one token with one block, the scratch block, which belongs to no sequence.

Knows batches and tensors; knows nothing of models.

Shape legend: S sequences of the bucket, B blocks of a table.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.kernels.sampling_rows import SamplingRows
from arriero.shards.config.group import GroupConfig
from arriero.shards.kv.paging import cache_slots
from arriero.shards.worker.cuda.device import Device, Event, Replayable

DRAFT_ROWS = 64
"""Rows for which a group with drafts has graphs though it has fewer sequences."""
GraphKey = tuple[int, bool | None]
"""Batch size, and whether all rows are greedy. With data-parallel attention the layers are a graph
of their own, with None, and the draws another; else a graph has both."""
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def buckets_up_to(most: int) -> tuple[int, ...]:
    """Batch sizes with graphs: 1, 2, 4, 8, then steps of 8 to 64, of 16 to 256, of 64 beyond."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < most:
        last = sizes[-1]
        sizes.append(last + (8 if last < 64 else 16 if last < 256 else 64))
    return (*(size for size in sizes if size < most), most)


def graph_rows(config: GroupConfig) -> int:
    """Rows of the largest graph: a row for each sequence, and rows for drafted tokens."""
    if not config.speculation.enabled:
        return config.max_sequences
    return max(config.max_sequences, min(config.max_batch_tokens, DRAFT_ROWS))


_COLUMNS = (
    "tokens",
    "slots",
    "positions",
    "contexts",
    "cache_slots",
    "local_positions",
    "local_contexts",
    "local_cache_slots",
    "top_k",
    "temperature",
    "top_p",
    "min_p",
)
"""Columns of four bytes per row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalDecode:
    """The inputs of a decode step for chunk-local layers; see `FlatBatch.local`.

    Attributes:
        positions: positions from the start of each sequence's frame, [S].
        table: block tables of the frames, int32 [S, B].
    """

    positions: Ints
    table: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBatch:
    """The inputs of a decode step on the host; arrays have [S] rows without padding.

    A sequence has a row for its last token, and a row for each drafted token.

    Attributes:
        tokens: int32; `LAST_SAMPLED` for a token that only the device has.
        slots: slots of the sequences.
        positions: positions of the input tokens.
        table: block tables up to the block of each token, int32 [S, B].
        temperature, top_p, min_p: float32.
        top_k: int32.
        seed: int64.
        local: inputs of chunk-local layers; None for a model without such layers.
    """

    tokens: Ints
    slots: Ints
    positions: Ints
    table: Ints
    temperature: Floats
    top_k: Ints
    top_p: Floats
    min_p: Floats
    seed: npt.NDArray[np.int64]
    local: LocalDecode | None = None


class DecodeInputs:
    """The input tensors of all decode graphs, with rows for the largest bucket.

    All inputs lie in a buffer of int32 words, so that a step needs a single copy from the host. Two
    host buffers alternate: a step fills a buffer while the other may still be copied.
    """

    def __init__(
        self,
        device: Device,
        where: torch.device,
        *,
        most: int,
        block_size: int,
        scratch_block: int,
        scratch_slot: int,
        max_local_blocks: int = 0,
        local_scratch_block: int = 0,
    ) -> None:
        """Allocate the buffers.

        Args:
            device: gives host memory and events.
            where: torch device of the tensors.
            most: the largest bucket.
            block_size: tokens in a block.
            scratch_block: KV block for the writes of padding rows.
            scratch_slot: sequence slot for the tokens of padding rows.
            max_local_blocks: largest number of blocks of a chunk-local table; 0 without them.
            local_scratch_block: the scratch block of the chunk-local cache.
        """
        self.max_local_blocks = max_local_blocks
        self.local_scratch_block = local_scratch_block
        self._device, self._block_size = device, block_size
        self.scratch_block, self._scratch_slot = scratch_block, scratch_slot
        self._columns = {name: i for i, name in enumerate(_COLUMNS)}
        self._most = most
        # columns begin at multiples of 16 bytes, which kernels are compiled for
        self._stride = -(-most // 4) * 4
        words = self._local_tables + most * max_local_blocks
        self._words = torch.zeros(words, dtype=torch.int32, device=where)
        self.starts_S1 = torch.arange(most + 1, dtype=torch.int32, device=where)
        self._host = [device.host((words,), torch.int32) for _ in range(2)]
        self._copied: list[Event | None] = [None, None]
        self._turn = 0

    def fill_padding(self, bucket: int) -> None:
        """Queue a batch of padding rows, on which a capture may run any number of times."""
        no_ints, no_floats = np.empty(0, np.int32), np.empty(0, np.float32)
        no_table = np.empty((0, 1), np.int32)
        self.fill(
            DecodeBatch(
                tokens=no_ints,
                slots=no_ints,
                positions=no_ints,
                table=no_table,
                temperature=no_floats,
                top_k=no_ints,
                top_p=no_floats,
                min_p=no_floats,
                seed=np.empty(0, np.int64),
                local=LocalDecode(positions=no_ints, table=no_table),
            ),
            bucket,
        )

    def fill(self, batch: DecodeBatch, bucket: int) -> None:
        """Queue the copy of a batch, padded to `bucket`; waits only for the second last copy.

        Writes each array once; padding rows are constants.
        """
        count = len(batch.tokens)
        assert count <= bucket <= self._most, f"{count} rows do not fit a bucket of {bucket}"
        self._turn ^= 1
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        host = self._host[self._turn]
        words = host.numpy()
        owner = np.arange(len(batch.positions), dtype=np.int32)
        values: dict[str, tuple[npt.NDArray[np.generic], float]] = {
            "tokens": (batch.tokens, 0),
            "slots": (batch.slots, self._scratch_slot),
            "positions": (batch.positions, 0),
            "contexts": (batch.positions + 1, 1),
            "cache_slots": (
                cache_slots(batch.table, owner, batch.positions, self._block_size),
                self.scratch_block * self._block_size,
            ),
            "top_k": (batch.top_k, 0),
            "temperature": (batch.temperature, 0),
            "top_p": (batch.top_p, 1),
            "min_p": (batch.min_p, 0),
        }
        local = batch.local if self.max_local_blocks else None
        if local is not None:
            values |= {
                "local_positions": (local.positions, 0),
                "local_contexts": (local.positions + 1, 1),
                "local_cache_slots": (
                    cache_slots(local.table, owner, local.positions, self._block_size),
                    self.local_scratch_block * self._block_size,
                ),
            }
        for name, (array, padding) in values.items():
            first = self._columns[name] * self._stride
            column = words[first : first + bucket].view(array.dtype)
            column[:count], column[count:] = array, padding
        longs = words[self._longs : self._longs + 4 * self._stride].view(np.int64)
        longs = longs.reshape(2, self._stride)
        longs[0, :count], longs[0, count:bucket] = batch.seed, 0
        longs[1, :count], longs[1, count:bucket] = batch.positions + 1, 0
        first = self._local_tables
        stop = first + bucket * self.max_local_blocks
        if local is not None:
            rows = words[first:stop].reshape(bucket, self.max_local_blocks)
            rows[:count, : local.table.shape[1]] = local.table
            rows[count:, 0] = self.local_scratch_block
        self._words[:stop].copy_(host[:stop], non_blocking=True)
        self._copied[self._turn] = self._device.mark()

    def ints(self, name: str, bucket: int) -> Tensor:
        """A column of the first `bucket` rows, int32 [S]."""
        first = self._columns[name] * self._stride
        return self._words[first : first + bucket]

    def local_table(self, bucket: int) -> Tensor:
        """Block tables of chunk-local layers, int32 [S, B]."""
        first, width = self._local_tables, self.max_local_blocks
        return self._words[first : first + bucket * width].view(bucket, width)

    def sampling_rows(self, bucket: int, *, all_greedy: bool) -> SamplingRows:
        """Sampling parameters without optional fields."""
        longs = self._words[self._longs : self._longs + 4 * self._stride].view(torch.int64)
        seed, position = longs.view(2, self._stride)[:, :bucket]

        def floats(name: str) -> Tensor:
            return self.ints(name, bucket).view(torch.float32)

        return SamplingRows(
            temperature_R=floats("temperature"),
            top_k_R=self.ints("top_k", bucket),
            top_p_R=floats("top_p"),
            min_p_R=floats("min_p"),
            seed_R=seed,
            position_R=position,
            all_greedy=all_greedy,
        )

    @property
    def _longs(self) -> int:
        """First word of the int64 columns."""
        return len(self._columns) * self._stride

    @property
    def _local_tables(self) -> int:
        return self._longs + 4 * self._stride


class GraphRunner:
    """The captured graphs, by key."""

    def __init__(self, device: Device, buckets: tuple[int, ...]) -> None:
        self.buckets = buckets
        self._device = device
        self._graphs: dict[GraphKey, Replayable] = {}

    @property
    def num_captured(self) -> int:
        """Number of captured graphs."""
        return len(self._graphs)

    def bucket(self, count: int) -> int:
        """The smallest batch size of a graph with at least `count` rows."""
        at = bisect.bisect_left(self.buckets, count)
        assert at < len(self.buckets), f"{count} rows exceed the largest bucket, {self.buckets[-1]}"
        return self.buckets[at]

    def has(self, key: GraphKey) -> bool:
        """Whether the graph of `key` is captured."""
        return key in self._graphs

    def capture(self, key: GraphKey, work: Callable[[], None]) -> None:
        """Capture the graph of `key`; runs `work` more than once on the current inputs."""
        self._graphs[key] = self._device.capture(work)

    def replay(self, key: GraphKey) -> None:
        """Queue the graph of `key` on the current inputs."""
        self._graphs[key].replay()
