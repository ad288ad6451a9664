"""Bytes of a model that drafts, on each rank of a group: weights, and a KV block.

The numbers are those that the slices report, to the byte. Knows settings and parts; knows nothing
of the rest of a rank's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arriero.cluster.planner.kv_room import stored_as
from arriero.cluster.planner.rank_weights import Weights, modules_weights, rank_weights, weights_as
from arriero.kernels.registry import BACKENDS, Kernels
from arriero.kernels.sizes import KvBlockSize
from arriero.shards.checkpoint.formats.describe import describe
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
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


def drafter_bytes(
    config: GroupConfig, target: AnyModel, part: AnyPart, kernels: Kernels
) -> DrafterBytes:
    """Bytes of the drafter of a group on the rank with `part`; nothing before the last stage.

    Raises:
        CheckpointError: the drafter's folder is unreadable.
        SpecError: the drafter cannot be cut as the target is.
    """
    speculation = config.speculation
    if not (speculation.in_slices and speculation.model_path and part.last_stage):
        return DrafterBytes()
    if speculation.kind == "eagle3":
        return _head_bytes(config, target, part, kernels, Path(speculation.model_path))
    model, scheme = describe(speculation.model_path)
    mesh = ParallelConfig(tp=config.tp, tp_shares=config.tp_shares)
    own = parts_of(model, mesh)[part.tp_rank]
    quantization = config.quantization if scheme is None else None
    weights = weights_as(model, scheme, stored_as(config.dtype, quantization, scheme))
    block = _kv_block(config, own, model.head_dim, kernels)
    return DrafterBytes(
        weights=rank_weights(model, own, weights, kernels).total,
        kv_block=block * model.num_layers,
    )


def _head_bytes(
    config: GroupConfig, target: AnyModel, part: AnyPart, kernels: Kernels, path: Path
) -> DrafterBytes:
    from arriero.shards.checkpoint.tensor_folder import TensorFolder  # needs torch

    head = Eagle3Config.from_folder(path)
    stored = Eagle3Tensors.of(TensorFolder.of(path).stored)
    own = eagle3_parts(head, config)[part.tp_rank]
    plain = weights_as(target, None, stored_as(config.dtype, None, None))
    total = modules_weights(eagle3_modules(head, stored), own, plain, kernels).total
    if not stored.has_embedding and not part.first_stage and not target.tie_word_embeddings:
        total += _embedding_bytes(config, target, part, kernels)
    return DrafterBytes(
        weights=total, kv_block=_kv_block(config, own, head.layer.head_dim, kernels)
    )


def _embedding_bytes(config: GroupConfig, target: AnyModel, part: AnyPart, kernels: Kernels) -> int:
    """The target's embedding, which a last stage of several lacks."""
    from arriero.shards.checkpoint.formats.stored import modules_of

    dtype = stored_as(config.dtype, config.quantization, None)
    weights: Weights = weights_as(target, None, dtype)
    modules = [module for module in modules_of(target, None) if module.kind == "embeddings"]
    return modules_weights(modules, part, weights, kernels).total


def _kv_block(config: GroupConfig, part: AnyPart, head_dim: int, kernels: Kernels) -> int:
    return BACKENDS[kernels].kv_block_nbytes(
        KvBlockSize(
            kv_heads=part.kv_heads.size,
            head_dim=head_dim,
            block_size=config.block_size,
            dtype=config.dtype,
        )
    )
