"""From a group's config to its resolved config: the leader decides every open setting once.

The slices receive the resolved config, so ranks cannot disagree. Needs no torch, so that a leader
starts fast.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from arriero.kernels.cpu import topology
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import SCALE_BYTES
from arriero.shards.errors import SpecError
from arriero.shards.kv.limits import GroupTierLimits, TierLimits
from arriero.shards.kv.paging import SeenBlocks
from arriero.shards.kv.transfers import Pool
from arriero.shards.layout.expert_placement import ExpertPlacement
from arriero.shards.layout.families import (
    attention_chunk,
    kv_bytes_per_block,
    local_layers,
    parts_of,
    pool_layers,
    visible_keys,
)
from arriero.shards.layout.moe import MoEPart
from arriero.shards.layout.parts import AnyModel, AnyPart

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZATIONS = ("int8", "int4", "fp8")
MAX_DEFAULT_KV_BYTES = 2 << 30
"""KV pool of a CPU group without a given size: this, or a quarter of memory if that is less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvRoom:
    """Memory for KV pools, of a device or of a whole group.

    Attributes:
        nbytes: bytes of memory.
        full: bytes of a block in layers with full attention.
        local: bytes of a block in layers with chunked attention.
    """

    nbytes: int
    full: int
    local: int


def resolve(config: GroupConfig, model: AnyModel) -> GroupConfig:
    """Fill in `num_blocks`, `max_model_len`, `layer_split` and `threads`.

    The KV pool of a group on GPUs must have a size: the leader sets the free memory of the devices.

    Raises:
        SpecError: a field is out of range; names field, value, limit and remedy.
    """
    _check_backend(config, model)
    limit = model.max_position_embeddings
    max_model_len = limit if config.max_model_len is None else config.max_model_len
    if not 1 <= max_model_len <= limit:
        raise SpecError(
            f"`max_model_len`={max_model_len} must be 1 to {limit}, the model's position limit"
        )
    visible = visible_keys(model, config)
    chunk = visible.chunk_size
    if chunk % config.block_size:
        raise SpecError(
            f"`block_size`={config.block_size} must divide the model's attention chunk of {chunk}"
        )
    parts = parts_of(model, config)
    _check_experts(config)
    full, local = group_block_bytes(config, model, parts)
    room = KvRoom(nbytes=_kv_bytes(config), full=full, local=local)
    num_blocks, num_local_blocks = num_kv_blocks(config, chunk, max_model_len, [room])
    seen = SeenBlocks(visible, config.block_size)
    if visible.window and num_blocks < seen.most(max_model_len):
        raise SpecError(
            f"a KV pool of {num_blocks} blocks of {config.block_size} tokens holds less than one "
            f"sequence's `sliding_window`={visible.window} and `attention_sinks`={visible.sinks}; "
            f"give memory for at least {seen.most(max_model_len)} blocks"
        )
    tier_limits(config, model)  # reports an invalid tier before anything is placed
    threads = config.threads
    if threads is None:
        threads = max(1, len(topology.cores()) // config.world_size)
    return replace(
        config,
        num_blocks=num_blocks,
        num_local_blocks=num_local_blocks if chunk else None,
        max_model_len=max_model_len,
        layer_split=tuple(part.layers.size for part in parts[:: config.stage_size]),
        threads=threads,
    )


def _check_activations(config: GroupConfig) -> None:
    stated = f"`activation_dtype`={config.activation_dtype}"
    if config.device != "cpu" or config.kernels not in (None, "cpu"):
        raise SpecError(f"{stated} needs `device`=cpu and `kernels`=cpu; leave it out elsewhere")
    if config.quantization == "fp8":
        raise SpecError(f"{stated} needs int8 or int4 weights; set `quantization` to one of them")


def _check_backend(config: GroupConfig, model: AnyModel) -> None:
    if config.dtype not in ITEMSIZE:
        raise SpecError(f"`dtype`={config.dtype!r} is none of {', '.join(ITEMSIZE)}")
    if config.quantization not in (None, *QUANTIZATIONS):
        raise SpecError(
            f"`quantization`={config.quantization!r} is none of {', '.join(QUANTIZATIONS)}"
        )
    if config.activation_dtype is not None:
        _check_activations(config)
    if not 0 <= config.offload_layers <= model.num_layers:
        raise SpecError(
            f"`offload_layers`={config.offload_layers} must be 0 to {model.num_layers}, the "
            "model's layers"
        )
    if config.offload_layers and (config.device != "cpu" or config.kernels not in (None, "cpu")):
        raise SpecError(
            f"`offload_layers`={config.offload_layers} needs `device`=cpu and `kernels`=cpu; "
            "other backends keep all weights on their device"
        )
    if config.batch_independent and config.kernels == "reference":
        raise SpecError(
            "`batch_independent`=True needs `kernels`=cpu or triton; the reference keeps it to "
            "rounding only"
        )
    if config.kv_dtype is not None and config.tiers.dtype is not None:
        raise SpecError(
            f"`tier_dtype`={config.tiers.dtype} packs blocks of the model's dtype, but "
            f"`kv_dtype`={config.kv_dtype} has a byte for each number already; remove `tier_dtype`"
        )
    if config.block_size < 1:
        raise SpecError(f"`block_size`={config.block_size} must be at least 1")


def _check_experts(config: GroupConfig) -> None:
    if config.spare_experts < 0 or (config.spare_experts and config.dp == 1):
        raise SpecError(
            f"`spare_experts`={config.spare_experts} must be 0 without data-parallel attention "
            f"(`dp`={config.dp}); else 0 or more"
        )


_TYPICAL_CHUNKS = 4
"""Attention chunks of a typical sequence, for dividing memory between the pools."""


def num_kv_blocks(
    config: GroupConfig,
    chunk: int,
    max_model_len: int,
    rooms: Sequence[KvRoom],
    *,
    whole: bool = False,
) -> tuple[int, int]:
    """KV blocks of the full-attention pool and of the chunk-local pool, for each dp rank.

    Args:
        config: config of the group.
        chunk: tokens of an attention chunk; 0 for none.
        max_model_len: resolved limit of a sequence.
        rooms: memory of each device, or of the whole group; the blocks must fit into each entry.
            Not used where the config gives the number of blocks.
        whole: take all of the memory, even beyond the need of the sequences that run at once; the
            rest keeps prefixes.

    Raises:
        SpecError: the memory is too small for a sequence.
    """
    size = config.block_size
    of_sequence = -(-max_model_len // size)
    of_chunk = -(-min(chunk, max_model_len) // size)
    if config.num_blocks is not None:
        most = min(config.num_blocks, config.max_sequences * of_chunk)
        return config.num_blocks, config.num_local_blocks or most
    num_local = config.num_local_blocks
    if num_local is None:
        typical = min(of_sequence, max(1, _TYPICAL_CHUNKS * of_chunk))
        sequences = min(
            room.nbytes / (typical * room.full + of_chunk * room.local) for room in rooms
        )
        num_local = int(min(max(1.0, sequences), config.max_sequences) * of_chunk)
    fits = []
    for room in rooms:
        left = room.nbytes - num_local * room.local
        if left < room.full:
            beside = f" beside chunk-local ones of {num_local * room.local}" if chunk else ""
            raise SpecError(
                f"`kv_bytes`={room.nbytes} holds no block of {room.full} bytes{beside}; "
                f"give at least {room.full + of_chunk * room.local}"
            )
        if room.full:
            fits.append(left // room.full)
    if not whole or not fits:
        fits.append(of_sequence * config.max_sequences)
    return min(fits), num_local


def group_block_bytes(
    config: GroupConfig, model: AnyModel, parts: Sequence[AnyPart]
) -> tuple[int, int]:
    """Bytes of one KV block over all ranks: in full-attention layers, in chunked layers."""
    full, local = 0, 0
    for part in parts:
        num_local = local_layers(model, part)
        rest = part.layers.size - num_local
        full += kv_bytes_per_block(part, model, rest, config.block_size, config.cache_dtype)
        local += kv_bytes_per_block(part, model, num_local, config.block_size, config.cache_dtype)
    return full, local


def first_placement(config: GroupConfig, parts: Sequence[AnyPart]) -> ExpertPlacement | None:
    """Placement of experts on a stage's ranks at the start; None without expert parallelism."""
    if config.dp == 1:
        return None
    stage = parts[: config.stage_size]
    sizes = [part.experts.size for part in stage if isinstance(part, MoEPart)]
    return ExpertPlacement.even(sizes, config.spare_experts)


def cache_salt(config: GroupConfig, digest: str) -> bytes:
    """Root of all block keys of a group: equal where groups can share blocks.

    Names the model and the types of its numbers: other weights or types mean other keys. Layouts
    agree to rounding, and are part of the root only with `same_layout`.
    """
    parts = [digest, config.dtype, config.quantization or ""]
    parts += [words for words in (config.kv_words, config.activation_words) if words]
    if config.window_words:  # keys and values of deeper layers depend on the tokens seen
        parts.append(config.window_words)
    if config.tiers.dtype is not None:
        parts.append(f"tiers {config.tiers.dtype}")
    if config.tiers.same_layout:
        layout = (config.tp, config.pp, config.tp_shares, config.device, config.kernels)
        parts += [str(field) for field in layout]
    return "\n".join(parts).encode()


def tier_limits(config: GroupConfig, model: AnyModel) -> GroupTierLimits:
    """Block limits of a group's tiers, for each of the data-parallel ranks.

    Raises:
        SpecError: a tier is too small for a block, or blocks cannot be kept.
    """
    tiers = config.tiers
    if not 0 < tiers.max_tenant_share <= 1:
        raise SpecError(f"`max_tenant_share`={tiers.max_tenant_share} must be above 0, at most 1")
    if not tiers.enabled:  # the share also bounds the prefixes that a tenant retains on the device
        return GroupTierLimits(all=TierLimits(max_tenant_share=tiers.max_tenant_share))
    if not config.prefix_cache:
        raise SpecError("tiers keep prefix blocks, but `prefix_cache` is off; turn it on")
    if bool(tiers.disk_bytes) != (tiers.disk_path is not None):
        raise SpecError(
            f"`disk_path`={tiers.disk_path} and `disk_bytes`={tiers.disk_bytes}: give both or none"
        )
    parts = parts_of(model, config)
    share = Fraction(1)
    if tiers.dtype is not None:
        share = Fraction(model.head_dim + SCALE_BYTES, model.head_dim * ITEMSIZE[config.dtype])
    sizes = group_block_bytes(config, model, parts)
    each = {pool: int(size * share) for pool, size in zip(Pool, sizes, strict=True)}
    if not each[Pool.ALL]:
        raise SpecError("tiers need a model with layers that see every token")
    counts = {pool: dict.fromkeys(("host_bytes", "disk_bytes"), 0) for pool in Pool}
    weights = _pool_weights(config, model)
    unit = sum(weights[pool] * each[pool] for pool in Pool)
    for name in ("host_bytes", "disk_bytes"):
        given = getattr(tiers, name)
        if given and given < unit:
            raise SpecError(
                f"`{name}`={given} does not hold the {unit} bytes of a prefix's blocks; give more"
            )
        for pool in Pool:
            counts[pool][name] = given * weights[pool] // unit
    dp_parts = [part for part in parts if config.dp_rank_of(part.rank) == 0]
    limits = {
        pool: TierLimits(
            host_blocks=counts[pool]["host_bytes"],
            disk_blocks=counts[pool]["disk_bytes"],
            shared=tiers.shared_url is not None,
            max_tenant_share=tiers.max_tenant_share,
            num_ranks=sum(len(range(*pool_layers(model, part, pool))) > 0 for part in dp_parts),
        )
        for pool in Pool
        if each[pool]
    }
    return GroupTierLimits(
        all=limits[Pool.ALL], local=limits.get(Pool.LOCAL, TierLimits()), bytes_share=share
    )


def _pool_weights(config: GroupConfig, model: AnyModel) -> dict[Pool, int]:
    """Blocks of each pool for a prefix; memory of a tier is divided in this proportion."""
    chunk = attention_chunk(model)
    if not chunk:
        return {Pool.ALL: 1, Pool.LOCAL: 0}
    longest = config.max_model_len or model.max_position_embeddings
    size = config.block_size
    of_sequence, of_chunk = -(-longest // size), -(-min(chunk, longest) // size)
    return {Pool.ALL: min(of_sequence, _TYPICAL_CHUNKS * of_chunk), Pool.LOCAL: of_chunk}


def _kv_bytes(config: GroupConfig) -> int:
    """Memory of the whole group's pools, where it is said in bytes, or by nothing.

    Raises:
        SpecError: nothing is said for a group on GPUs; only their memory can say.
    """
    if config.kv_bytes is not None:
        return config.kv_bytes
    if config.device == "cuda" and config.num_blocks is None:
        raise SpecError(
            "`kv_bytes` and `num_blocks` are not set, and the memory that the group's GPUs leave "
            "was not asked for; set one of them"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(MAX_DEFAULT_KV_BYTES, memory // 4)
