"""The model families that a slice can hold, and the common interface of their slices.

Knows the class for each config; knows nothing of layers and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.expert_rows import RowFormat
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.ops import Ops
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.expert_parallel import Loads
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.kv.transfers import Pool
from arriero.shards.layout.dense import SlicePart
from arriero.shards.layout.expert_placement import ExpertPlacement
from arriero.shards.layout.moe import MoEPart
from arriero.shards.layout.parts import AnyPart
from arriero.shards.model_config.llama4 import Llama4Config
from arriero.shards.models.image_table import ImageTable
from arriero.shards.models.llama import LlamaSlice
from arriero.shards.models.llama4 import Llama4Slice
from arriero.shards.models.loader import Progress
from arriero.shards.protocol.step_plan import Int32


class ModelSlice(Protocol):
    """Weights and KV cache of a rank, and the forward pass.

    Attributes:
        dtype: dtype of weights and KV cache.
        images: computes image features, on first-stage ranks of multimodal models; else None.
        decoder: forward pass through the layers of the stage.
    """

    dtype: torch.dtype
    images: ImageTable | None
    decoder: Callable[[Tensor, FlatBatch], Tensor]

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

    def take_loads(self) -> dict[int, Loads]:
        """Number of tokens routed to each expert since the last call, by layer."""

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Token embeddings [T, H], on the first stage."""

    def logits(self, x_RH: Tensor) -> Tensor:
        """Logits of this rank's vocabulary rows, float32 [R, V], on the last stage."""


def load_slice(
    checkpoint: Checkpoint,
    part: AnyPart,
    mesh: Mesh,
    ops: Ops,
    *,
    dtype: torch.dtype,
    quantization: str | None,
    num_blocks: int,
    num_local_blocks: int,
    block_size: int,
    offload_layers: int,
    offload_folder: Path | None,
    wire: RowFormat | None,
    placement: ExpertPlacement | None,
    visible: AttentionMaskSpec,
    progress: Progress,
) -> ModelSlice:
    """Load the part of a checkpoint for a rank.

    Args:
        checkpoint: open checkpoint, already checked against the config.
        part: part of this rank.
        mesh: ranks of the group.
        ops: kernels.
        dtype: dtype of weights and KV cache.
        quantization: quantization of plain weights during loading, or None.
        num_blocks: KV blocks of layers with full attention.
        num_local_blocks: KV blocks of layers with chunked attention.
        block_size: tokens in a block.
        offload_layers: number of last layers (Llama 4: their experts) that stay mapped from disk.
        offload_folder: folder for these layers, or None for the system's temporary folder.
        wire: how rows travel to experts on other ranks; None: as the weights are.
        placement: experts of each rank of a stage; None without all-to-all exchange.
        visible: keys that a token sees in layers without full attention.
        progress: called with loaded bytes and total bytes.
    """
    if isinstance(checkpoint.config, Llama4Config):
        assert isinstance(part, MoEPart), "cut as a Llama 4"
        return Llama4Slice(
            checkpoint,
            part,
            mesh,
            ops,
            dtype=dtype,
            quantization=quantization,
            num_blocks=num_blocks,
            num_local_blocks=num_local_blocks,
            block_size=block_size,
            offload_layers=offload_layers,
            offload_folder=offload_folder,
            placement=placement,
            wire=wire,
            progress=progress,
        )
    assert isinstance(part, SlicePart), "cut as a dense Llama"
    return LlamaSlice(
        checkpoint,
        part,
        mesh,
        ops,
        dtype=dtype,
        quantization=quantization,
        num_blocks=num_blocks,
        block_size=block_size,
        offload_layers=offload_layers,
        offload_folder=offload_folder,
        visible=visible,
        progress=progress,
    )
