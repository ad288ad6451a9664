"""Partition of any served model, and its consequences for weights and caches.

One entry for each family of models. Needs no torch, so that leaders and planners start fast.
"""

from __future__ import annotations

from collections.abc import Sequence

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError
from arriero.shards.kv.transfers import Pool
from arriero.shards.layout.dense import partition
from arriero.shards.layout.moe import partition_moe
from arriero.shards.layout.parts import AnyModel, AnyPart
from arriero.shards.model_config.llama4 import Llama4Config


def parts_of(model: AnyModel, mesh: ParallelConfig) -> Sequence[AnyPart]:
    """Cut `model` into a part for each rank of `mesh`.

    Raises:
        SpecError: the mesh does not fit the model; names the field, its value and the limit.
    """
    if isinstance(model, Llama4Config):
        return partition_moe(model, mesh)
    return partition(model, mesh)


def local_layers(model: AnyModel, part: AnyPart) -> int:
    """Number of a rank's layers with chunked attention."""
    if not isinstance(model, Llama4Config):
        return 0
    return sum(model.rope_layers[part.layers.start : part.layers.stop])


def pool_layers(model: AnyModel, part: AnyPart, pool: Pool) -> tuple[int, int]:
    """A rank's layers of a pool, first and past the last, counted among the pool's layers only."""
    local = model.rope_layers if isinstance(model, Llama4Config) else (False,) * model.num_layers
    in_pool = [is_local is (pool is Pool.LOCAL) for is_local in map(bool, local)]
    return sum(in_pool[: part.layers.start]), sum(in_pool[: part.layers.stop])


def kv_bytes_per_block(
    part: AnyPart, model: AnyModel, layers: int, block_size: int, itemsize: int
) -> int:
    """Bytes of one KV block on one rank, for `layers` of the rank's layers."""
    return layers * 2 * part.kv_heads.size * block_size * model.head_dim * itemsize


def visible_keys(model: AnyModel, config: GroupConfig) -> AttentionMaskSpec:
    """Attention mask of layers without full attention: chunks, or the window of the config.

    Raises:
        SpecError: the model cannot have the window; or the window would change the answers without
            `changes_answers`; or the model was trained with a window and the config has none.
    """
    window, sinks = config.sliding_window, config.attention_sinks
    if isinstance(model, Llama4Config):
        if window is not None or sinks:
            raise SpecError(
                f"`sliding_window`={window}, `attention_sinks`={sinks}: Llama 4 cannot have them. "
                f"Three layers of four see chunks of {model.attention_chunk_size} tokens already, "
                "and the others are without positions and carry the whole context, images "
                "included; leave both out"
            )
        return AttentionMaskSpec(chunk_size=model.attention_chunk_size)
    trained, limit = model.sliding_window, model.max_position_embeddings
    if window is None:
        if sinks:
            raise SpecError(
                f"`attention_sinks`={sinks} needs `sliding_window`; without a window all tokens "
                "are kept; leave the sinks out"
            )
        if trained is not None:
            raise SpecError(
                f"`sliding_window` is not set, and the model's config.json says {trained}: every "
                f"layer was trained with that window; set `sliding_window` to {trained}"
            )
        return FULL_ATTENTION
    if not 1 <= window <= limit:
        raise SpecError(
            f"`sliding_window`={window} must be 1 to {limit}, the model's position limit"
        )
    if not 0 <= sinks <= limit:
        raise SpecError(
            f"`attention_sinks`={sinks} must be 0 to {limit}, the model's position limit"
        )
    if (window, sinks) != (trained, 0) and not config.changes_answers:
        was = "full attention" if trained is None else f"a window of {trained} and no sinks"
        raise SpecError(
            f"`sliding_window`={window} with `attention_sinks`={sinks} changes this model's "
            f"answers: it was trained with {was}, and tokens outside the window are forgotten; "
            "set `changes_answers` to true if that is meant, or leave the window out"
        )
    return AttentionMaskSpec(window=window, sinks=sinks)


def attention_chunk(model: AnyModel) -> int:
    """Tokens of an attention chunk; 0 without chunked attention."""
    return model.attention_chunk_size if isinstance(model, Llama4Config) else 0
