"""Opens the drafter of a group: reads its folder, checks it, loads a rank's part.

In two phases, since a rank of any stage must know which activations to keep before its slice of the
target is loaded, and the drafter may use tables of that slice. Knows settings, folders and parts;
knows nothing of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.kv_cache import cache_dtype
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Vocab
from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.kv_scales import kv_scales
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError
from arriero.shards.families.registry import family_of
from arriero.shards.layout.draft_model import check_draft_model
from arriero.shards.layout.families import parts_of, visible_keys
from arriero.shards.layout.parts import AnyModel, AnyPart
from arriero.shards.models.eagle3.config import Eagle3Config
from arriero.shards.models.eagle3.slice import Eagle3Settings, Eagle3Slice
from arriero.shards.models.eagle3.tensors import Eagle3Tensors, eagle3_parts
from arriero.shards.models.llama.slice import EMBEDDING
from arriero.shards.models.loader import Loader
from arriero.shards.models.model_slice import ModelSlice, SliceSettings, load_slice
from arriero.shards.worker.rope_table import Rope
from arriero.shards.worker.speculation.model_drafter import ModelDrafter
from arriero.shards.worker.speculation.networks import DraftNetwork, Eagle3Network, ModelNetwork
from arriero.shards.worker.speculation.paged_rows import PagedRows


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A rank of the last stage, with its slice of the target loaded.

    Attributes:
        checkpoint: checkpoint of the target.
        model: the slice.
        parts: parts of the target, of all ranks of the group.
        mesh: ranks of the group.
        ops: kernels.
        num_blocks: KV blocks of the slice's pool of all tokens.
    """

    checkpoint: Checkpoint
    model: ModelSlice
    parts: Sequence[AnyPart]
    mesh: Mesh
    ops: Ops
    num_blocks: int

    @property
    def part(self) -> AnyPart:
        """Part of this rank."""
        return self.mesh.part

    @property
    def vocab_sizes(self) -> list[int]:
        """Rows of the target's head on each tp rank."""
        first = self.part.rank - self.part.tp_rank
        return [part.vocab.size for part in self.parts[first : first + self.mesh.tp]]


class DraftSource(Protocol):
    """A drafter's folder, read and checked.

    Attributes:
        taps: activations of the target that each rank keeps, on any stage.
    """

    taps: tuple[int, ...]

    def load(self, target: Target) -> ModelDrafter:
        """Load this rank's part, on ranks of the last stage.

        Raises:
            CheckpointError: the folder does not match its config.
            SpecError: the drafter cannot be cut as the target is.
        """


def draft_source(config: GroupConfig, target: AnyModel) -> DraftSource | None:
    """The drafter of a group; None where the slices draft nothing.

    Raises:
        CheckpointError: the folder is unreadable, or the drafter is another target's.
        SpecError: the settings name no folder, or a model that cannot draft.
    """
    speculation = config.speculation
    if not speculation.in_slices:
        return None
    if speculation.model_path is None:
        raise SpecError(
            f"`speculation`: kind {speculation.kind!r} needs a model; set `model_path` to the "
            "folder of a smaller model or of an EAGLE-3 head"
        )
    if speculation.kind == "eagle3":
        return Eagle3Source(config, target, Path(speculation.model_path))
    return ModelSource(config, target, speculation.model_path)


class ModelSource:
    """A smaller model of the same vocabulary."""

    taps: tuple[int, ...] = ()

    def __init__(self, config: GroupConfig, target: AnyModel, path: str) -> None:
        self._config = config
        self._checkpoint = Checkpoint.open(path)
        model = self._checkpoint.config
        check_draft_model(model, target, path)
        self._parts = parts_of(model, alone(config))

    def load(self, target: Target) -> ModelDrafter:
        """Load this rank's part."""
        config, checkpoint, mesh = self._config, self._checkpoint, target.mesh
        checkpoint.check_whole()
        part = self._parts[target.part.tp_rank]
        settings = SliceSettings(
            dtype=getattr(torch, config.dtype),
            quantization=None if checkpoint.scheme is not None else config.quantization,
            num_blocks=target.num_blocks,
            block_size=config.block_size,
            kv_dtype=cache_dtype(config.cache_dtype),
            kv_scales=kv_scales(checkpoint, part.layers) if config.scales_kv else {},
            visible=_visible(config, target.checkpoint.config),
        )
        model = load_slice(checkpoint, part, mesh, target.ops, settings)
        network = ModelNetwork(model, mesh, [part.vocab.size for part in self._parts])
        return _drafter(config, network, checkpoint.config, target)


class Eagle3Source:
    """An EAGLE-3 head of the target."""

    def __init__(self, config: GroupConfig, target: AnyModel, path: Path) -> None:
        self._config, self._path = config, path
        self.head = Eagle3Config.from_folder(path)
        self.head.check_target(target, str(path))
        self.taps = self.head.taps(target.num_layers, config.speculation.tap_ids)
        self._parts = eagle3_parts(self.head, config)

    def load(self, target: Target) -> ModelDrafter:
        """Load this rank's part, and the target's tables that the head lacks."""
        config, mesh = self._config, target.mesh
        stored = Eagle3Tensors.of(TensorFolder.of(self._path).stored)
        embedding = lm_head = None
        if not stored.has_embedding:
            embedding = target_embedding(config, target)
        if not stored.has_head:
            lm_head = target.model.head
        settings = Eagle3Settings(
            dtype=getattr(torch, config.dtype),
            kv_dtype=cache_dtype(config.cache_dtype),
            num_blocks=target.num_blocks,
            block_size=config.block_size,
            visible=_visible(config, target.checkpoint.config),
            embedding=embedding,
            lm_head=lm_head,
        )
        part = self._parts[target.part.tp_rank]
        head = Eagle3Slice(self._path, self.head, part, mesh, target.ops, settings)
        sizes = [part.draft_vocab.size for part in self._parts]
        extra = 0
        if embedding is not None and embedding is not target.model.embedding:
            extra = 0 if embedding is target.model.head else embedding.nbytes
        network = Eagle3Network(
            head,
            mesh,
            sizes if stored.has_head else target.vocab_sizes,
            self.taps,
            extra_nbytes=extra,
        )
        return _drafter(config, network, self.head.layer, target)


def alone(config: ParallelConfig) -> ParallelConfig:
    """The mesh of a drafter: the tensor-parallel ranks of one stage, with the target's shares."""
    return ParallelConfig(tp=config.tp, tp_shares=config.tp_shares)


def target_embedding(config: GroupConfig, target: Target) -> Vocab:
    """The target's embedding on a rank of the last stage; loaded where the stage has none."""
    model, checkpoint = target.model, target.checkpoint
    if model.embedding is not None:
        return model.embedding
    if checkpoint.config.tie_word_embeddings and model.head is not None:
        return model.head
    prefix = family_of(checkpoint.config).text_prefix(checkpoint.config)
    name = f"{prefix}{EMBEDDING}"
    specs = [
        spec
        for spec in tensor_specs(checkpoint.config, checkpoint.scheme)
        if spec.name.startswith(f"{name}.")
    ]
    loader = Loader(
        checkpoint,
        checkpoint.scheme,
        specs,
        target.part,
        target.ops,
        dtype=getattr(torch, config.dtype),
        quantization=config.quantization,
    )
    with loader:
        return loader.vocab(name, target.part.vocab)


def _visible(config: GroupConfig, target: AnyModel) -> AttentionMaskSpec:
    """The target's window, whose old blocks are freed; a drafter has no chunks."""
    mask = visible_keys(target, config)
    return FULL_ATTENTION if mask.chunk_size else mask


def _drafter(
    config: GroupConfig, network: DraftNetwork, model: AnyModel, target: Target
) -> ModelDrafter:
    assert config.max_model_len is not None, "resolved"
    rows = PagedRows(
        max_sequences=config.max_sequences,
        max_blocks=-(-config.max_model_len // config.block_size),
        block_size=config.block_size,
        rope=Rope(model.inv_freq(), config.max_model_len, target.mesh.device),
        device=target.mesh.device,
    )
    return ModelDrafter(network, rows, target.mesh, target.ops, config.max_sequences)
