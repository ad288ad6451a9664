"""Block sizes of the kernels, by GPU, kernel and shape: `tuned.json`, and what stands in for it.

Knows numbers measured elsewhere; refuses to measure.
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
    """Of the attention kernels. All fields but the last two decide the order of sums.

    Attributes:
        block_m: rows (queries times heads of a group) of a tile; 64 or more takes Hopper's
            asynchronous products, for prefill and decode alike, so that both sum alike.
        block_n: keys of a tile.
        split: keys of the shortest split of a context; a multiple of `block_n`.
        most_splits: splits double in length until a context has at most so many.
        num_warps, num_stages: of the launch.
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
class ProductBlocks:
    """Of a product [M, I] x [O, I]: a tile is block_m x block_n, over block_k columns at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def attention_blocks(device: torch.device, head_dim: int, kv_dtype: torch.dtype) -> AttentionBlocks:
    """The blocks for heads of `head_dim` over a cache of `kv_dtype`."""
    shape = f"{head_dim}:{str(kv_dtype)[6:]}"
    return AttentionBlocks(**_find(_name(device), "attention", shape))


def product_blocks(
    device: torch.device, kind: str, out_features: int, in_features: int, rows: int | None
) -> ProductBlocks:
    """The blocks for weights of `kind` [out_features, in_features].

    Args:
        device: where it runs.
        kind: dense, int8, fp8 or int4.
        out_features: of the weights.
        in_features: of the weights.
        rows: of the input, for the fastest choice; None for one that serves any number of rows,
            so that a row's sum does not depend on the others.
    """
    shape = f"{kind}:{out_features}x{in_features}"
    name = _name(device)
    found = _find(name, "product", shape)
    if rows is not None and not INTERPRETED:
        found = found | _find_by_rows(name, shape, rows)
    blocks = ProductBlocks(**found)
    # no wider than the weights: of a router with 16 experts, 16 outputs
    return replace(
        blocks,
        block_n=min(blocks.block_n, power_of_two(out_features, 16)),
        block_k=min(blocks.block_k, power_of_two(in_features, 32)),
    )


def _find_by_rows(name: str, shape: str, rows: int) -> dict[str, Any]:
    """Tuned for up to so many rows, else the usual sizes: few rows, short tiles."""
    table = _table().get(name, {}).get("product_by_rows", {}).get(shape, {})
    for limit in sorted(table, key=int):
        if rows <= int(limit):
            found: dict[str, Any] = table[limit]
            return found
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
                found: dict[str, Any] = shapes[wanted]
                return found
    raise KeyError(f"{FILE.name} has no default for {kernel}")


@cache
def _name(device: torch.device) -> str:
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(FILE.read_text())
    return table


def names_of(blocks: type) -> tuple[str, ...]:
    """The fields that an entry of the file must have."""
    return tuple(field.name for field in fields(blocks))
