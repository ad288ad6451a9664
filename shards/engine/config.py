"""Limits of the engine, derived from a group's resolved config."""

from __future__ import annotations

from arriero.shards.adapters.adapter import open_adapters
from arriero.shards.config.group import GroupConfig
from arriero.shards.engine.types import EngineConfig
from arriero.shards.families.registry import family_of
from arriero.shards.layout.families import parts_of, visible_keys
from arriero.shards.layout.parts import AnyModel
from arriero.shards.layout.resolve import cache_salt, first_placement, tier_limits


def engine_config(config: GroupConfig, model: AnyModel, digest: str) -> EngineConfig:
    """Limits of the engine of a resolved group.

    Args:
        config: resolved config of the group.
        model: config of the model.
        digest: digest of the checkpoint; the root of every block's key.

    Raises:
        CheckpointError: a listed adapter does not fit the model or the slots.
    """
    assert config.num_blocks is not None and config.max_model_len is not None, "unresolved"
    visible = visible_keys(model, config)
    listed = open_adapters(config, model)
    return EngineConfig(
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        attention_chunk=visible.chunk_size,
        num_local_blocks=config.num_local_blocks or 0,
        attention_window=visible.window,
        attention_sinks=visible.sinks,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        max_queued=config.max_queued,
        prefix_cache=config.prefix_cache,
        pipeline_depth=max(2, config.pp),
        num_stages=config.pp,
        num_dp_ranks=config.dp,
        experts=first_placement(config, parts_of(model, config)),
        move_experts=config.spare_experts > 0,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        image_token=family_of(model).image_token(model),
        cache_salt=cache_salt(config, digest),
        tiers=tier_limits(config, model),
        adapters=tuple(adapter.digest for adapter in listed),
        adapter_paths=tuple(file.path for file in config.adapters),
        adapter_slots=config.adapter_slots,
        num_ranks=config.world_size // config.dp,
        speculation=config.speculation,
    )
