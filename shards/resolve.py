"""From what a group asks for to what it gets: every open setting decided, once, by the leader.

The slices are sent the resolved settings, so ranks cannot disagree. Needs no torch, so that a
leader starts fast.
"""

from __future__ import annotations

import os
from dataclasses import replace

from arriero.shards.engine.types import EngineConfig
from arriero.shards.errors import SpecError
from arriero.shards.group import GroupConfig
from arriero.shards.kv.limits import TierLimits
from arriero.shards.models.config import ModelConfig
from arriero.shards.partition import SlicePart, kv_bytes_per_block, partition

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZATIONS = ("int8", "int4", "fp8")
MAX_DEFAULT_KV_BYTES = 2 << 30
"""The KV pool of a CPU group that names no size: this, or a quarter of memory if that is less."""


def resolve(config: GroupConfig, model: ModelConfig) -> GroupConfig:
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
    parts = partition(model, config)
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
        layer_split=tuple(part.layers.size for part in parts[:: config.tp]),
        threads=threads,
    )


def group_block_bytes(config: GroupConfig, model: ModelConfig, parts: list[SlicePart]) -> int:
    """Bytes of one KV block over all ranks of the group."""
    itemsize = ITEMSIZE[config.dtype]
    return sum(kv_bytes_per_block(part, model, config.block_size, itemsize) for part in parts)


def engine_config(config: GroupConfig, model: ModelConfig, digest: str) -> EngineConfig:
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
        cache_salt=cache_salt(config, digest),
        tiers=tier_limits(config, model),
    )


def cache_salt(config: GroupConfig, digest: str) -> bytes:
    """What all keys of a group's blocks begin with: equal where blocks are worth the same.

    Names the model, and how its numbers are held: other weights, other types, other keys. Layouts
    agree to rounding, and are named only where every bit is asked for.
    """
    parts = [digest, config.dtype, config.quantization or ""]
    if config.tiers.same_layout:
        parts += [
            str(one)
            for one in (config.tp, config.pp, config.tp_shares, config.device, config.kernels)
        ]
    return "\n".join(parts).encode()


def tier_limits(config: GroupConfig, model: ModelConfig) -> TierLimits:
    """How many blocks the tiers of a resolved group hold.

    Raises:
        SpecError: a tier that holds no block, or blocks cannot be kept.
    """
    tiers = config.tiers
    if not tiers.enabled:
        return TierLimits()
    if not config.prefix_cache:
        raise SpecError("`tiers` keep prefix blocks, and `prefix_cache` is off; turn it on")
    if not 0 < tiers.max_tenant_share <= 1:
        raise SpecError(f"`max_tenant_share`={tiers.max_tenant_share} must be above 0, at most 1")
    block_bytes = group_block_bytes(config, model, partition(model, config))
    disk_bytes = tiers.disk_bytes if tiers.disk_path is not None else 0
    counts = []
    for name, given, wanted in (
        ("host_bytes", tiers.host_bytes, bool(tiers.host_bytes)),
        ("disk_bytes", disk_bytes, tiers.disk_path is not None),
    ):
        if wanted and given < block_bytes:
            raise SpecError(f"`{name}`={given} holds no block of {block_bytes} bytes; give more")
        counts.append(given // block_bytes)
    return TierLimits(
        host_blocks=counts[0],
        disk_blocks=counts[1],
        shared=tiers.shared_url is not None,
        max_tenant_share=tiers.max_tenant_share,
        num_ranks=config.world_size,
    )


def _default_kv_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(MAX_DEFAULT_KV_BYTES, memory // 4)
