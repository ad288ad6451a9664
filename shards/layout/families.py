"""Partition of any served model, and its consequences for weights and caches.

Asks the model's family; needs no torch, so that leaders and planners start fast.
"""

from __future__ import annotations

from collections.abc import Sequence

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.sizes import KvBlockSize
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.families.registry import family_of
from arriero.shards.kv.transfers import Pool
from arriero.shards.layout.parts import AnyModel, AnyPart


def parts_of(model: AnyModel, mesh: ParallelConfig) -> Sequence[AnyPart]:
    """Cut `model` into a part for each rank of `mesh`.

    Raises:
        SpecError: the mesh does not fit the model; names the field, its value and the limit.
    """
    return family_of(model).partition(model, mesh)


def local_layers(model: AnyModel, part: AnyPart) -> int:
    """Number of a rank's layers with chunked attention."""
    return sum(family_of(model).chunked_layers(model)[part.layers.start : part.layers.stop])


def pool_layers(model: AnyModel, part: AnyPart, pool: Pool) -> tuple[int, int]:
    """A rank's layers of a pool, first and past the last, counted among the pool's layers only."""
    local = family_of(model).chunked_layers(model) or (False,) * model.num_layers
    in_pool = [is_local is (pool is Pool.LOCAL) for is_local in local]
    return sum(in_pool[: part.layers.start]), sum(in_pool[: part.layers.stop])


def kv_bytes_per_block(
    part: AnyPart, model: AnyModel, layers: int, block_size: int, dtype: str
) -> int:
    """Bytes of one KV block of `dtype` on one rank, for `layers` of the rank's layers."""
    block = KvBlockSize(
        kv_heads=part.kv_heads.size, head_dim=model.head_dim, block_size=block_size, dtype=dtype
    )
    return layers * block.nbytes(slots=block_size, value_dim=model.head_dim)


def visible_keys(model: AnyModel, config: GroupConfig) -> AttentionMaskSpec:
    """Attention mask of layers without full attention: chunks, or the window of the config.

    Raises:
        SpecError: the model cannot have the window; or the window would change the answers without
            `changes_answers`; or the model was trained with a window and the config has none.
    """
    return family_of(model).attention_mask(model, config)


def attention_chunk(model: AnyModel) -> int:
    """Tokens of an attention chunk; 0 without chunked attention."""
    return family_of(model).attention_chunk(model)
