"""Every family of models that a slice can hold: one entry each.

Knows which class serves which config; knows nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.expert_rows import RowFormat
from arriero.kernels.ops import FlatBatch, KVCache, Ops
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
    """The weights and KV cache of one rank, and the pass through them.

    Attributes:
        dtype: of weights and KV cache.
        images: what turns images into features, on ranks that embed and models that see.
        decoder: the pass through the layers.
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
        """The KV cache, of each pool that has layers here."""

    def sit_out(self) -> None:
        """A step in which other data-parallel ranks have tokens, and this one has none."""

    def place_experts(self, layer: int, expert_S: Int32) -> None:
        """Follow another placement of a layer's experts over the ranks of its stage."""

    def take_loads(self) -> dict[int, Loads]:
        """Tokens that each expert was sent since the last call, by layer."""

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Token embeddings, [T, H]: on the first stage."""

    def logits(self, x_RH: Tensor) -> Tensor:
        """Logits of the vocabulary rows held here, float32 [R, V]: on the last stage."""


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
    """Load what `part` holds of a checkpoint.

    Args:
        checkpoint: open, and checked to hold what its config says.
        part: of this rank.
        mesh: of its group.
        ops: the kernels.
        dtype: of weights and KV cache.
        quantization: of the weights while they load, or None.
        num_blocks: KV blocks of the layers that see everything.
        num_local_blocks: of those that attend within their chunk.
        block_size: tokens in a block.
        offload_layers: how many of the last layers (Llama 4: their experts) stay mapped from disk.
        offload_folder: where to, or None for the system's folder for temporary files.
        wire: how rows travel to experts on other ranks; None: as the weights are.
        placement: of the experts over the ranks of a stage; None where they are not exchanged.
        visible: which keys a token sees in layers that do not see everything.
        progress: called while weights load.
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
