"""The model of a rank in memory: loaded, released, and loaded again between two steps.

Knows the parts that hold weights and KV cache; knows nothing of plans and of who asks.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from arriero.kernels.kv_cache import cache_dtype
from arriero.kernels.ops import Ops
from arriero.kernels.packed_file import PackedFile
from arriero.shards.adapters.adapter import open_adapters
from arriero.shards.checkpoint.kv_scales import kv_scales
from arriero.shards.checkpoint.packed_cache import open_packed
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.group import GroupConfig
from arriero.shards.layout.families import visible_keys
from arriero.shards.layout.parts import AnyPart
from arriero.shards.layout.resolve import first_placement
from arriero.shards.models.loader import Progress
from arriero.shards.models.model_slice import ModelSlice, SliceSettings, load_slice
from arriero.shards.worker.malloc import returning_large_buffers
from arriero.shards.worker.speculation.sources import Target, draft_source
from arriero.shards.worker.speculation.step_drafts import StepDrafts


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidentModel:
    """Weights and KV cache of a rank.

    Attributes:
        model: the rank's slice.
        drafts: the rank's part of a model that drafts; None without.
    """

    model: ModelSlice
    drafts: StepDrafts | None

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all weights, adapters and drafter included."""
        total = self.model.weights_nbytes
        if self.model.adapters is not None:
            total += self.model.adapters.nbytes
        return total + (0 if self.drafts is None else self.drafts.drafter.weights_nbytes)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the KV cache, with the drafter's."""
        return self.model.kv_nbytes + (0 if self.drafts is None else self.drafts.drafter.kv_nbytes)


def load_resident(
    config: GroupConfig,
    checkpoint: Checkpoint,
    parts: Sequence[AnyPart],
    mesh: Mesh,
    ops: Ops,
    *,
    spare_blocks: int = 0,
    progress: Progress = lambda done, total: None,
) -> ResidentModel:
    """Load the weights of a rank, and allocate an empty KV cache.

    Args:
        config: resolved config of the group.
        checkpoint: open checkpoint, already checked.
        parts: parts of all ranks.
        mesh: ranks of the group.
        ops: kernels.
        spare_blocks: KV blocks for the runner's own use, beside the configured blocks.
        progress: called with loaded bytes and total bytes.
    """
    model_config = checkpoint.config
    source = draft_source(config, model_config)
    assert config.num_blocks is not None, "unresolved"
    settings = SliceSettings(
        dtype=getattr(torch, config.dtype),
        quantization=config.quantization,
        num_blocks=config.num_blocks + spare_blocks,
        num_local_blocks=(config.num_local_blocks or 0) + spare_blocks,
        block_size=config.block_size,
        kv_dtype=cache_dtype(config.cache_dtype),
        kv_scales=kv_scales(checkpoint, mesh.part.layers) if config.scales_kv else {},
        offload_layers=config.offload_layers,
        offload_folder=Path(config.offload_folder) if config.offload_folder else None,
        wire=config.expert_wire,
        placement=first_placement(config, parts),
        visible=visible_keys(model_config, config),
        taps=source.taps if source is not None else (),
        progress=progress,
        packed=_packed_file(config, checkpoint, mesh.part, ops),
        adapters=open_adapters(config, model_config),
        adapter_slots=config.adapter_slots,
    )
    drafts: StepDrafts | None = None
    with returning_large_buffers():
        model = load_slice(checkpoint, mesh.part, mesh, ops, settings)
        if source is not None and mesh.part.last_stage:
            target = Target(
                checkpoint=checkpoint,
                model=model,
                parts=parts,
                mesh=mesh,
                ops=ops,
                num_blocks=settings.num_blocks,
            )
            drafts = StepDrafts(source.load(target), model.taps, mesh)
    return ResidentModel(model=model, drafts=drafts)


def _packed_file(
    config: GroupConfig, checkpoint: Checkpoint, part: AnyPart, ops: Ops
) -> PackedFile | None:
    if config.offload_layers:  # these weights stay mapped from a file of their own
        return None
    form = f"{config.dtype} {config.quantization} {config.activation_words}".strip()
    if config.scales_kv:  # the weights take the scales of the KV cache
        form = f"{form} {config.kv_words}"
    return open_packed(checkpoint, part, ops, form, config.packed_cache_bytes)


def give_memory_back(device: torch.device) -> None:
    """Return memory of released weights to the system and to the device."""
    gc.unfreeze()  # objects of the start were exempt from collections; see `worker.loop`
    gc.collect()
    with returning_large_buffers():
        pass  # trims the heap
    if device.type == "cuda":
        torch.cuda.empty_cache()
    gc.freeze()
