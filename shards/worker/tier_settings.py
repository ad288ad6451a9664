"""Settings of the KV tiers of a rank, for each pool with layers on the rank.

Knows layouts and keys; knows nothing of threads and copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.kv.block_shards import BlockShard
from arriero.shards.kv.transfer_worker import TierSettings
from arriero.shards.kv.transfers import Pool
from arriero.shards.layout.families import pool_layers
from arriero.shards.layout.parts import AnyPart
from arriero.shards.layout.resolve import cache_salt, tier_limits


def tier_settings(
    config: GroupConfig,
    parts: Sequence[AnyPart],
    part: AnyPart,
    pools: Iterable[Pool],
    host: str,
) -> dict[Pool, TierSettings]:
    """Settings of each pool of a rank.

    The salt names folders alone, after the model folder: pushed weights keep the folders, since the
    keys of blocks hold the digest of the weights.

    Args:
        config: resolved config of the group.
        parts: parts of all ranks.
        part: part of the rank.
        pools: pools with layers on the rank.
        host: address of this node, where ranks of other nodes may read host memory.
    """
    checkpoint = Checkpoint.open(config.model_path)
    model = checkpoint.config
    limits = tier_limits(config, model)
    dp_rank = config.dp_rank_of(part.rank)
    earlier_parts = [
        other for other in parts[: part.rank] if config.dp_rank_of(other.rank) == dp_rank
    ]
    settings = {}
    for pool in pools:
        shard, *earlier_shards = (
            BlockShard(
                pool_layers(model, rank_part, pool),
                (rank_part.kv_heads.start, rank_part.kv_heads.stop),
            )
            for rank_part in (part, *earlier_parts)
        )
        settings[pool] = TierSettings(
            config=config.tiers,
            salt=cache_salt(config, checkpoint.digest),
            host_slots=(limits.all if pool is Pool.ALL else limits.local).host_blocks,
            rank=part.rank,
            pool=pool,
            dp_rank=dp_rank,
            shard=shard,
            host=host,
            writes=shard not in earlier_shards,
        )
    return settings
