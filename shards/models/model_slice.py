"""The common interface of the slices of all model families, and their loading.

Knows what a runner needs of a slice; knows nothing of layers and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.expert_rows import RowFormat
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.lora import AdapterRows
from arriero.kernels.ops import Ops
from arriero.kernels.packed_file import PackedFile
from arriero.kernels.packed_weights import Vocab
from arriero.shards.adapters.adapter import Adapter
from arriero.shards.adapters.banks import AdapterBanks
from arriero.shards.checkpoint.kv_scales import KvScales
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.expert_parallel import Loads
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.adapters import AdapterSlots
from arriero.shards.families.registry import family_of
from arriero.shards.kv.transfers import Pool
from arriero.shards.layout.expert_placement import ExpertPlacement
from arriero.shards.layout.parts import AnyPart
from arriero.shards.models.image_table import ImageTable
from arriero.shards.models.loader import Progress
from arriero.shards.models.taps import Taps
from arriero.shards.protocol.step_plan import Int32


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceSettings:
    """How a slice is loaded, and the size of its KV cache.

    Attributes:
        dtype: dtype of weights, and of the KV cache without `kv_dtype`.
        quantization: quantization of plain weights during loading, or None.
        num_blocks: KV blocks of layers with full attention.
        num_local_blocks: KV blocks of layers with chunked attention.
        block_size: tokens in a block.
        offload_layers: number of last layers (with experts: their experts) that stay mapped from
            disk.
        offload_folder: folder for these layers, or None for the system's temporary folder.
        wire: how rows travel to experts on other ranks; None: as the weights are.
        placement: experts of each rank of a stage; None if ranks sum outputs of own experts
            instead of exchanging tokens.
        kv_dtype: dtype of the KV cache; None means `dtype`.
        kv_scales: scales of the KV cache by layer, which the weights take; 1 where missing.
        visible: keys that a token sees in layers without full attention.
        taps: layers whose input is kept for a model that drafts; see `Taps`.
        progress: called with loaded bytes and total bytes.
        packed: packed weights of an earlier start; None packs all.
        adapters: listed adapters of the group, in order of their slots.
        adapter_slots: room for adapters that come and go; None for the listed adapters alone.
    """

    dtype: torch.dtype
    num_blocks: int
    block_size: int
    quantization: str | None = None
    num_local_blocks: int = 0
    offload_layers: int = 0
    offload_folder: Path | None = None
    wire: RowFormat | None = None
    placement: ExpertPlacement | None = None
    kv_dtype: torch.dtype | None = None
    kv_scales: Mapping[int, KvScales] = field(default_factory=dict)
    visible: AttentionMaskSpec = FULL_ATTENTION
    taps: tuple[int, ...] = ()
    progress: Progress = lambda done, total: None
    packed: PackedFile | None = None
    adapters: Sequence[Adapter] = ()
    adapter_slots: AdapterSlots | None = None

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of the KV cache."""
        return self.kv_dtype or self.dtype


class ModelSlice(Protocol):
    """Weights and KV cache of a rank, and the forward pass.

    Attributes:
        dtype: dtype of the weights.
        images: computes image features, on first-stage ranks of multimodal models; else None.
        decoder: forward pass through the layers of the stage.
        adapters: memory of the rank for adapters; None in a group without adapters.
        taps: inputs of layers, kept during a step for a model that drafts.
        embedding, head: rows of the vocabulary on this rank; None on stages without them. A tied
            head is the embedding.
    """

    dtype: torch.dtype
    images: ImageTable | None
    decoder: Callable[[Tensor, FlatBatch], Tensor]
    adapters: AdapterBanks | None
    taps: Taps
    embedding: Vocab | None
    head: Vocab | None

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all packed weights."""

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the KV cache."""

    @property
    def kv_pools(self) -> Mapping[Pool, KVCache]:
        """The KV cache of each pool with layers on this rank."""

    def run_dummy_step(self) -> None:
        """Run a step without tokens, because other data-parallel ranks have tokens."""

    def place_experts(self, layer: int, expert_S: Int32) -> None:
        """Apply a new placement of a layer's experts over the ranks of the stage."""

    def pad_exchange(self, num_tokens: int) -> None:
        """Send rows to experts in blocks of a fixed size in the next steps.

        Args:
            num_tokens: most tokens of a data-parallel rank in a step, the same number on all
                ranks; 0 for exact numbers of rows, for which the host waits.
        """

    def take_loads(self) -> dict[int, Loads]:
        """Number of tokens routed to each expert since the last call, by layer."""

    def embed(self, tokens_T: Tensor, rows: AdapterRows | None = None) -> Tensor:
        """Token embeddings [T, H], on the first stage; `rows`: tokens with an adapter."""

    def logits(self, x_RH: Tensor, rows: AdapterRows | None = None) -> Tensor:
        """Logits of this rank's vocabulary rows, float32 [R, V], on the last stage.

        Args:
            x_RH: output of the last layer.
            rows: rows of `x_RH` with an adapter.
        """


def load_slice(
    checkpoint: Checkpoint, part: AnyPart, mesh: Mesh, ops: Ops, settings: SliceSettings
) -> ModelSlice:
    """Load the part of a checkpoint for a rank.

    Args:
        checkpoint: open checkpoint, already checked against the config.
        part: part of this rank.
        mesh: ranks of the group.
        ops: kernels.
        settings: how the slice is loaded.
    """
    module, _, name = family_of(checkpoint.config).slice.partition(":")
    make = getattr(import_module(module), name)
    return cast(ModelSlice, make(checkpoint, part, mesh, ops, settings))
