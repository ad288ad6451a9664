"""Block sizes of the kernels, by GPU, kernel and shape: `tuned.json`, and defaults.

Knows the results of measurements; knows nothing of how they were measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from arriero.kernels.triton.launch import INTERPRETED, power_of_two

FILE = Path(__file__).with_name("tuned.json")
ANY = "*"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBlocks:
    """Blocks of the attention kernels. All fields except the last two decide the order of sums.

    Attributes:
        block_m: rows (queries times heads of a group) of a tile; from 64 on Hopper's asynchronous
            matrix instructions run, in prefill and decode, so that both sum in the same order.
        block_n: keys of a tile.
        split: keys of the shortest split of a context; a multiple of `block_n`.
        most_splits: largest number of splits of a context; longer contexts have longer splits,
            twice as long each time.
        num_warps, num_stages: launch options.
    """

    block_m: int
    block_n: int
    split: int
    most_splits: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.split % self.block_n:
            raise ValueError(f"split={self.split} is not a multiple of block_n={self.block_n}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulBlocks:
    """Blocks of a matmul [M, I] x [O, I]: a tile is block_m x block_n, a step block_k columns."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def attention_blocks(device: torch.device, head_dim: int, kv_dtype: torch.dtype) -> AttentionBlocks:
    """The blocks for heads of size `head_dim` and a cache of dtype `kv_dtype`."""
    shape = f"{head_dim}:{str(kv_dtype)[6:]}"
    return AttentionBlocks(**_find(_name(device), "attention", shape))


def matmul_blocks(
    device: torch.device, kind: str, out_features: int, in_features: int, rows: int | None
) -> MatmulBlocks:
    """The blocks for weights of `kind` [out_features, in_features].

    Args:
        device: device of the kernel.
        kind: dense, int8, fp8 or int4.
        out_features: rows of the weights.
        in_features: columns of the weights.
        rows: rows of the input, for the fastest choice; None for the same choice at any number of
            rows, so that the sum of a row does not depend on the other rows.
    """
    shape = f"{kind}:{out_features}x{in_features}"
    name = _name(device)
    settings = _find(name, "product", shape)
    if rows is not None and not INTERPRETED:
        settings = settings | _find_by_rows(name, shape, rows)
    blocks = MatmulBlocks(**settings)
    # Blocks are no wider than the weights: a router with 16 experts has 16 outputs.
    return replace(
        blocks,
        block_n=min(blocks.block_n, power_of_two(out_features, 16)),
        block_k=min(blocks.block_k, power_of_two(in_features, 32)),
    )


def _find_by_rows(name: str, shape: str, rows: int) -> dict[str, Any]:
    """Tuned blocks for the number of rows, else defaults: few rows have short tiles."""
    table = _table().get(name, {}).get("product_by_rows", {}).get(shape, {})
    for limit in sorted(table, key=int):
        if rows <= int(limit):
            settings: dict[str, Any] = table[limit]
            return settings
    if rows <= 16:
        return {"block_m": 16, "block_k": 128}
    if rows <= 128:
        return {}
    return {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 3}


@cache
def _find(name: str, kernel: str, shape: str) -> dict[str, Any]:
    for key in (name, "default"):
        shapes = _table().get(key, {}).get(kernel, {})
        for wanted in (shape, ANY):
            if wanted in shapes:
                settings: dict[str, Any] = shapes[wanted]
                return settings
    raise KeyError(f"{FILE.name} has no default for {kernel}")


@cache
def _name(device: torch.device) -> str:
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(FILE.read_text())
    return table


def field_names(blocks: type) -> tuple[str, ...]:
    """The fields that an entry of `tuned.json` must have."""
    return tuple(field.name for field in fields(blocks))
