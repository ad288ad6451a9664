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
    """Blocks of the attention kernels; `block_n`, `split` and `most_splits` order the sums.

    Attributes:
        block_m: rows (heads of a group) of an exact decode's tile; from 64 on Hopper's asynchronous
            matrix instructions run, in prefill and decode, so that both sum in the same order.
        block_n: keys of a tile.
        split: keys of the shortest split of a context; a multiple of `block_n`.
        most_splits: largest number of splits of a context; longer contexts have longer splits,
            twice as long each time.
        num_warps, num_stages: launch options of a decode.
        prefill_block_m: rows (queries times heads of a group) of a prefill's tile.
        prefill_num_warps, prefill_num_stages: launch options of a prefill. The rows of a tile for
            each warp are as many as in a decode, so that a row's sums have the same order.
        fast_block_m, fast_block_n, fast_num_warps, fast_num_stages: a decode's tile and launch
            options where its bits may differ from a prefill's.
    """

    block_m: int
    block_n: int
    split: int
    most_splits: int
    num_warps: int
    num_stages: int
    prefill_block_m: int
    prefill_num_warps: int
    prefill_num_stages: int
    fast_block_m: int
    fast_block_n: int
    fast_num_warps: int
    fast_num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_n", "fast_block_n"):
            if self.split % getattr(self, name):
                size = getattr(self, name)
                raise ValueError(f"split={self.split} is not a multiple of {name}={size}")

    @property
    def prefill(self) -> AttentionBlocks:
        """The same blocks with a prefill's tile and launch options in place of a decode's."""
        return replace(
            self,
            block_m=self.prefill_block_m,
            num_warps=self.prefill_num_warps,
            num_stages=self.prefill_num_stages,
        )

    @property
    def fast(self) -> AttentionBlocks:
        """The same blocks with the tile and launch options of a fast decode."""
        return replace(
            self,
            block_m=self.fast_block_m,
            block_n=self.fast_block_n,
            num_warps=self.fast_num_warps,
            num_stages=self.fast_num_stages,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulBlocks:
    """Blocks of a matmul [M, I] x [O, I]: a tile is block_m x block_n, a step block_k columns.

    A step of four-bit weights has whole blocks of columns (`four_bit_sizes`), at least one.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRule:
    """When several programs share the columns of a tile of a product.

    Attributes:
        processors: multiprocessors; 0 for those of the device. A product with fewer tiles is split.
        waves: programs for each multiprocessor at most, parts included.
        least_columns: columns of the shortest part.
    """

    processors: int
    waves: int
    least_columns: int


@cache
def split_rule(device: torch.device) -> SplitRule:
    """The rule for a device, with its number of multiprocessors."""
    rule = SplitRule(**_find(_names(device), "split", ()))
    if rule.processors:
        return rule
    properties = torch.cuda.get_device_properties(device)
    return replace(rule, processors=properties.multi_processor_count)


def num_splits(rule: SplitRule, tiles: int, columns: int) -> int:
    """Parts of the columns of a product; 1 for a product with enough tiles.

    Args:
        rule: of the device.
        tiles: tiles of the outputs.
        columns: columns of the weights.
    """
    if tiles >= rule.processors:
        return 1
    return max(1, min(rule.waves * rule.processors // tiles, columns // rule.least_columns))


def attention_blocks(device: torch.device, head_dim: int, kv_dtype: torch.dtype) -> AttentionBlocks:
    """The blocks for heads of size `head_dim` and a cache of dtype `kv_dtype`."""
    shapes = (f"{head_dim}:{str(kv_dtype)[6:]}", f"{head_dim}:*")
    return AttentionBlocks(**_find(_names(device), "attention", shapes))


def matmul_blocks(
    device: torch.device, kind: str, out_features: int, in_features: int, rows: int | None
) -> MatmulBlocks:
    """The blocks for weights of `kind` [out_features, in_features].

    Args:
        device: device of the kernel.
        kind: dense, int8, fp8, int4 or fp4.
        out_features: rows of the weights.
        in_features: columns of the weights.
        rows: rows of the input, for the fastest choice; None for the same choice at any number of
            rows, so that the sum of a row does not depend on the other rows.
    """
    shape = f"{kind}:{out_features}x{in_features}"
    names = _names(device)
    settings = _find(names, "product", (shape,))
    if rows is not None and not INTERPRETED:
        settings = settings | _find_by_rows(names, shape, rows)
    blocks = MatmulBlocks(**settings)
    # Blocks are no wider than the weights: a router with 16 experts has 16 outputs.
    return replace(
        blocks,
        block_n=min(blocks.block_n, power_of_two(out_features, 16)),
        block_k=min(blocks.block_k, power_of_two(in_features, 32)),
    )


def _find_by_rows(names: tuple[str, ...], shape: str, rows: int) -> dict[str, Any]:
    """Tuned blocks for the number of rows, else defaults: few rows have short tiles."""
    kind = f"{shape.partition(':')[0]}:*"
    for name in names:
        shapes = _table().get(name, {}).get("product_by_rows", {})
        for wanted in (shape, kind, ANY):
            table = shapes.get(wanted, {})
            for limit in sorted(table, key=int):
                if rows <= int(limit):
                    settings: dict[str, Any] = table[limit]
                    return settings
    raise KeyError(f"{FILE.name} has no default for products of {rows} rows")


@cache
def _find(names: tuple[str, ...], kernel: str, shapes: tuple[str, ...]) -> dict[str, Any]:
    for name in names:
        table = _table().get(name, {}).get(kernel, {})
        for wanted in (*shapes, ANY):
            if wanted in table:
                settings: dict[str, Any] = table[wanted]
                return settings
    raise KeyError(f"{FILE.name} has no default for {kernel}")


@cache
def _names(device: torch.device) -> tuple[str, ...]:
    """Keys of `tuned.json`, the first wins: this GPU, its compute capability, any GPU.

    Capabilities with the same first number have the same matrix instructions.
    """
    if INTERPRETED:
        return "interpreter", "default"
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return name, f"sm_{major}{minor}", f"sm_{major}x", "default"


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(FILE.read_text())
    return table


def field_names(blocks: type) -> tuple[str, ...]:
    """The fields that an entry of `tuned.json` must have."""
    return tuple(field.name for field in fields(blocks))
