"""Who holds what of any model that is served, and where its weights and caches follow from that.

One entry for each family of models. Needs no torch, so that leaders and planners start fast.
"""

from __future__ import annotations

from collections.abc import Sequence

from arriero.shards.checkpoint.formats.stored import AnyModel, AnyPart
from arriero.shards.errors import SpecError
from arriero.shards.group import GroupConfig
from arriero.shards.kv.moves import Pool
from arriero.shards.models.llama4_config import Llama4Config
from arriero.shards.partition import partition
from arriero.shards.partition_moe import MoEMesh, partition_moe


def parts_of(model: AnyModel, config: GroupConfig) -> Sequence[AnyPart]:
    """Cut `model` as `config` says; one part a rank.

    Raises:
        SpecError: the mesh does not fit the model; names the field, its value and the limit.
    """
    if isinstance(model, Llama4Config):
        return partition_moe(
            model,
            MoEMesh(
                tp=config.tp,
                pp=config.pp,
                dp=config.dp,
                ep=config.ep,
                tp_shares=config.tp_shares,
                layer_split=config.layer_split,
            ),
        )
    if config.dp != 1 or config.ep not in (None, 1):
        raise SpecError(
            f"`dp`={config.dp}, `ep`={config.ep}: a dense model has no experts to spread; use "
            "more groups instead"
        )
    return partition(model, config)


def lane_of(config: GroupConfig, rank: int) -> int:
    """The data-parallel rank that a rank is of."""
    return rank // config.tp % config.dp


def local_layers(model: AnyModel, part: AnyPart) -> int:
    """How many of a rank's layers attend within their chunk only."""
    if not isinstance(model, Llama4Config):
        return 0
    return sum(model.rope_layers[part.layers.start : part.layers.stop])


def pool_layers(model: AnyModel, part: AnyPart, pool: Pool) -> tuple[int, int]:
    """A rank's layers of a pool, first and past the last, counted among the pool's layers alone."""
    local = model.rope_layers if isinstance(model, Llama4Config) else (False,) * model.num_layers
    mine = [one is (pool is Pool.LOCAL) for one in map(bool, local)]
    return sum(mine[: part.layers.start]), sum(mine[: part.layers.stop])


def kv_bytes_per_block(
    part: AnyPart, model: AnyModel, layers: int, block_size: int, itemsize: int
) -> int:
    """Bytes of one KV block on one rank, over `layers` of its layers."""
    return layers * 2 * part.kv_heads.size * block_size * model.head_dim * itemsize


def attention_chunk(model: AnyModel) -> int:
    """Tokens of an attention chunk; 0 where every layer sees everything."""
    return model.attention_chunk_size if isinstance(model, Llama4Config) else 0
