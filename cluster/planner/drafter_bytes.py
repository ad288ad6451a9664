"""Bytes of a model that drafts, on each rank of a group: weights, and a KV block.

The numbers are those that the slices report, to the byte. Knows settings and parts; knows nothing
of the rest of a rank's memory. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from arriero.cluster.planner.rank_weights import modules_weights, rank_weights
from arriero.cluster.planner.tensor_names import tensor_names
from arriero.cluster.planner.weight_forms import Weights, stored_as, weights_as
from arriero.kernels.registry import BACKENDS, Kernels
from arriero.kernels.sizes import KvBlockSize
from arriero.shards.checkpoint.formats.describe import describe
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import modules_of
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.config.speculation import DraftKind
from arriero.shards.layout.draft_model import check_draft_model
from arriero.shards.layout.families import parts_of
from arriero.shards.layout.parts import AnyModel, AnyPart
from arriero.shards.models.eagle3.config import Eagle3Config
from arriero.shards.models.eagle3.tensors import Eagle3Tensors, eagle3_modules, eagle3_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterBytes:
    """Bytes of a drafter on a rank; its KV cache has as many blocks as the target's.

    Attributes:
        weights: packed weights, with the target's embedding where a head needs it on a stage
            without one.
        kv_block: a KV block of all layers of the drafter.
    """

    weights: int = 0
    kv_block: int = 0


NOTHING = DrafterBytes()


@dataclass(frozen=True, kw_only=True, slots=True)
class KvForm:
    """Form of the KV blocks of a group.

    Attributes:
        block_size: tokens of a block.
        dtype: dtype of keys and values.
        kernels: the backend that lays out the blocks.
    """

    block_size: int
    dtype: str
    kernels: Kernels

    def layer_nbytes(self, part: AnyPart, head_dim: int) -> int:
        """Bytes of a block in a layer on the rank with `part`."""
        size = KvBlockSize(
            kv_heads=part.kv_heads.size,
            head_dim=head_dim,
            block_size=self.block_size,
            dtype=self.dtype,
        )
        return BACKENDS[self.kernels].kv_block_nbytes(size)


class Drafter(Protocol):
    """The settings of a drafter's folder, read once for all layouts."""

    @property
    def kind(self) -> DraftKind:
        """Kind of the drafter."""

    def on_rank(self, part: AnyPart, mesh: ParallelConfig, kv: KvForm) -> DrafterBytes:
        """Bytes on the rank with `part` of the target; nothing before the last stage.

        Raises:
            SpecError: the drafter cannot be cut as the target is.
        """


def read_drafter(config: GroupConfig, target: AnyModel) -> Drafter | None:
    """The drafter of a group; None where the slices draft nothing.

    Raises:
        CheckpointError: the drafter's folder is unreadable, or belongs to another target.
        SpecError: the model cannot draft.
    """
    speculation = config.speculation
    if not (speculation.in_slices and speculation.model_path):
        return None
    path = Path(speculation.model_path)
    if speculation.kind == "eagle3":
        head = Eagle3Config.from_folder(path)
        head.check_target(target, str(path))
        head.taps(target.num_layers, speculation.tap_ids)  # raises where the target lacks a layer
        return _Head(
            head=head,
            stored=Eagle3Tensors.of(tensor_names(path)),
            target=target,
            dtype=config.dtype,
            quantization=config.quantization,
        )
    model, scheme = describe(path)
    check_draft_model(model, target, str(path))
    return _SmallModel(
        model=model, scheme=scheme, dtype=config.dtype, quantization=config.quantization
    )


def drafter_bytes(
    config: GroupConfig, target: AnyModel, part: AnyPart, kernels: Kernels
) -> DrafterBytes:
    """Bytes of the drafter of a group on the rank with `part`; nothing before the last stage.

    Raises:
        CheckpointError: the drafter's folder is unreadable, or belongs to another target.
        SpecError: the drafter cannot be cut as the target is.
    """
    drafter = read_drafter(config, target)
    if drafter is None:
        return NOTHING
    kv = KvForm(block_size=config.block_size, dtype=config.cache_dtype, kernels=kernels)
    return drafter.on_rank(part, config, kv)


@dataclass(frozen=True, kw_only=True, slots=True)
class _SmallModel:
    """A smaller model of the target's vocabulary."""

    model: AnyModel
    scheme: QuantScheme | None
    dtype: str
    quantization: str | None

    @property
    def kind(self) -> DraftKind:
        return "draft"

    def on_rank(self, part: AnyPart, mesh: ParallelConfig, kv: KvForm) -> DrafterBytes:
        if not part.last_stage:
            return NOTHING
        own_mesh = ParallelConfig(tp=mesh.tp, tp_shares=mesh.tp_shares)
        own = parts_of(self.model, own_mesh)[part.tp_rank]
        quantization = self.quantization if self.scheme is None else None
        form = stored_as(self.dtype, quantization, self.scheme)
        weights = weights_as(self.model, self.scheme, form)
        return DrafterBytes(
            weights=rank_weights(self.model, own, weights, kv.kernels).total,
            kv_block=kv.layer_nbytes(own, self.model.head_dim) * self.model.num_layers,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """An EAGLE-3 head of the target."""

    head: Eagle3Config
    stored: Eagle3Tensors
    target: AnyModel
    dtype: str
    quantization: str | None

    @property
    def kind(self) -> DraftKind:
        return "eagle3"

    def on_rank(self, part: AnyPart, mesh: ParallelConfig, kv: KvForm) -> DrafterBytes:
        if not part.last_stage:
            return NOTHING
        own = eagle3_parts(self.head, mesh)[part.tp_rank]
        plain = weights_as(self.target, None, stored_as(self.dtype, None, None))
        modules = eagle3_modules(self.head, self.stored)
        total = modules_weights(modules, own, plain, kv.kernels).total
        lacks_table = not part.first_stage and not self.target.tie_word_embeddings
        if not self.stored.has_embedding and lacks_table:
            total += self._embedding_nbytes(part, kv.kernels)
        return DrafterBytes(weights=total, kv_block=kv.layer_nbytes(own, self.head.layer.head_dim))

    def _embedding_nbytes(self, part: AnyPart, kernels: Kernels) -> int:
        """Bytes of the target's embedding, which a last stage of several lacks."""
        form = stored_as(self.dtype, self.quantization, None)
        weights: Weights = weights_as(self.target, None, form)
        modules = [
            module for module in modules_of(self.target, None) if module.kind == "embeddings"
        ]
        return modules_weights(modules, part, weights, kernels).total
