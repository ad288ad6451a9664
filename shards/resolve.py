"""From what a group asks for to what it gets: every open setting decided, once, by the leader.

The slices are sent the resolved settings, so ranks cannot disagree. Needs no torch, so that a
leader starts fast.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from arriero.shards.checkpoint.formats.stored import AnyModel, AnyPart
from arriero.shards.engine.types import EngineConfig
from arriero.shards.errors import SpecError
from arriero.shards.group import GroupConfig
from arriero.shards.layout import kv_bytes_per_block, parts_of

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZATIONS = ("int8", "int4", "fp8")
MAX_DEFAULT_KV_BYTES = 2 << 30
"""The KV pool of a CPU group that names no size: this, or a quarter of memory if that is less."""


def resolve(config: GroupConfig, model: AnyModel) -> GroupConfig:
    """Fill in `num_blocks`, `max_model_len`, `layer_split` and `threads`.

    Raises:
        SpecError: a field that cannot be; names field, value, limit and remedy.
    """
    if config.dtype not in ITEMSIZE:
        raise SpecError(f"`dtype`={config.dtype!r} is none of {', '.join(ITEMSIZE)}")
    if config.quantization not in (None, *QUANTIZATIONS):
        raise SpecError(
            f"`quantization`={config.quantization!r} is none of {', '.join(QUANTIZATIONS)}"
        )
    if config.block_size < 1:
        raise SpecError(f"`block_size`={config.block_size} must be at least 1")
    limit = model.max_position_embeddings
    max_model_len = limit if config.max_model_len is None else config.max_model_len
    if not 1 <= max_model_len <= limit:
        raise SpecError(
            f"`max_model_len`={max_model_len} must be 1 to {limit}, the model's position limit"
        )
    parts = parts_of(model, config)
    block_bytes = group_block_bytes(config, model, parts)
    num_blocks = config.num_blocks
    if num_blocks is None:
        kv_bytes = _default_kv_bytes() if config.kv_bytes is None else config.kv_bytes
        most = -(-max_model_len // config.block_size) * config.max_sequences
        num_blocks = min(kv_bytes // block_bytes, most)
    if num_blocks < 1:
        raise SpecError(
            f"`kv_bytes`={config.kv_bytes} holds no block of {block_bytes} bytes; "
            f"give at least {block_bytes}"
        )
    threads = config.threads
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) // config.world_size)
    return replace(
        config,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        layer_split=tuple(part.layers.size for part in parts[:: config.tp * config.dp]),
        threads=threads,
    )


def group_block_bytes(config: GroupConfig, model: AnyModel, parts: Sequence[AnyPart]) -> int:
    """Bytes of one KV block over all ranks of the group."""
    itemsize = ITEMSIZE[config.dtype]
    return sum(
        kv_bytes_per_block(part, model, part.layers.size, config.block_size, itemsize)
        for part in parts
    )


def engine_config(config: GroupConfig, model: AnyModel, digest: str) -> EngineConfig:
    """Limits of the engine of a resolved group.

    Args:
        config: resolved.
        model: the model's numbers.
        digest: the checkpoint's; the root of every block's key.
    """
    assert config.num_blocks is not None and config.max_model_len is not None, "unresolved"
    return EngineConfig(
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        max_queued=config.max_queued,
        prefix_cache=config.prefix_cache,
        pipeline_depth=max(2, config.pp),
        num_stages=config.pp,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        cache_salt=digest.encode(),
    )


def _default_kv_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(MAX_DEFAULT_KV_BYTES, memory // 4)
