"""The fastest of a dozen block choices for each shape, as entries of `tuned.json`.

A choice that fails to compile or to launch is left out. Only choices that keep the order of sums
are tried, except products by rows, which are off when rows must be independent of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any
from unittest import mock

import torch
from gpu import benches, checks, shapes
from gpu.benches import Machine, Result
from gpu.checks import Where
from gpu.shapes import LLAMA_8B, LLAMA_405B_TP8, Shape
from torch import Tensor

from arriero.kernels.packed_weights import Linear
from arriero.kernels.triton import backend, matmul, tuning
from arriero.kernels.triton.backend import TritonOps

Settings = dict[str, Any]
PRODUCTS = {"8B gate_up": (28672, 4096), "8B down": (4096, 14336), "405B/TP8 qkv": (2304, 16384)}
ROWS = {16: 1, 128: 64, 1_000_000_000: 4096}
"""Rows of an input for each limit of `product_by_rows`."""


def products(at: Where, machine: Machine) -> Result:
    """Entries `product_by_rows` for int8 and int4 weights."""
    ops, found = TritonOps(at.device, batch_independent=False), Result()
    chosen = {"tiny": (96, 64)} if at.tiny else PRODUCTS
    for out_features, in_features in chosen.values():
        weight = torch.randn(out_features, in_features, device=at.device) * in_features**-0.5
        for kind in ("int8",) if at.tiny else ("int8", "int4_symmetric"):
            linear = checks.pack(ops, kind, weight, at.dtype)
            entry = {}
            for limit, rows in ROWS.items():
                x = at.randn(min(rows, 4) if at.tiny else rows, in_features)

                def taken(settings: Settings, x: Tensor = x, linear: Linear = linear) -> float:
                    def blocks(*args: Any) -> tuning.MatmulBlocks:  # noqa: ANN401
                        return replace(tuning.matmul_blocks(*args), **settings)

                    with mock.patch.object(matmul, "matmul_blocks", blocks):
                        return benches.seconds(at, lambda: ops.linear(x, linear))

                best = fastest(_product_choices(rows, at.tiny), taken)
                if best is not None:
                    entry[str(limit)] = best
            found[f"{kind.partition('_')[0]}:{out_features}x{in_features}"] = entry
    return {"product_by_rows": found}


def _product_choices(rows: int, tiny: bool) -> Iterator[Settings]:
    if tiny:
        yield {"num_warps": 4}
        return
    if rows <= 16:
        for n, k, stages in product((64, 128), (128, 256), (3, 5)):
            yield {"block_m": 16, "block_n": n, "block_k": k, "num_warps": 4, "num_stages": stages}
    else:
        for m, n, stages in product((64, 128), (64, 128), (3, 4)):
            for k in (64,) if rows > 128 else (64, 128):
                warps = 8 if m * n > 8192 else 4
                yield {"block_m": m, "block_n": n, "block_k": k, "num_warps": warps,
                       "num_stages": stages}  # fmt: skip


def attention(at: Where, machine: Machine) -> Result:
    """Launch options and tiles of attention, for each cache.

    The order of sums stays, except in fast decodes.
    """
    found = Result()
    for shape in (LLAMA_8B,) if at.tiny else (LLAMA_8B, LLAMA_405B_TP8):
        shape = shape.tiny() if at.tiny else shape
        for dtype in (at.dtype,) if at.tiny else (torch.bfloat16, torch.int8, checks.FP8):
            blocks = tuning.attention_blocks(at.device, shape.head_dim, dtype)
            count, cached = (1, 9) if at.tiny else (64, 4095)
            decode = _attention_s(at, shape, dtype, [(cached, 1)] * count)
            prefill = _attention_s(at, shape, dtype, [(0, 6 if at.tiny else 4096)])
            choices = [{"num_stages": stages} for stages in (2, 3, 4)]
            best = fastest(iter(choices[:1] if at.tiny else choices), decode) or {}
            fast = _attention_s(at, shape, dtype, [(cached, 1)] * count, independent=False)
            choices = [
                {"fast_block_n": n, "fast_num_stages": stages}
                for n, stages in product((64, 128), (2, 3))
            ]
            best |= fastest(iter(choices[:1] if at.tiny else choices), fast) or {}
            choices = [
                {
                    "prefill_block_m": m,
                    "prefill_num_warps": m * blocks.num_warps // blocks.block_m,
                    "prefill_num_stages": stages,
                }
                for m, stages in product((64, 128), (2, 3))
            ]
            best |= fastest(iter(choices[:1] if at.tiny else choices), prefill) or {}
            found[f"{shape.head_dim}:{str(dtype)[6:]}"] = asdict(replace(blocks, **best))
    return {"attention": found}


def _attention_s(
    at: Where,
    shape: Shape,
    dtype: torch.dtype,
    sequences: list[tuple[int, int]],
    *,
    independent: bool = True,
) -> Callable[[Settings], float]:
    ops = TritonOps(at.device, batch_independent=independent)
    kv = shapes.cache(ops, shape, sequences, dtype, at.device, layers=1)
    batch = shapes.batch(sequences, shape.head_dim, at.device)
    q = at.randn(len(batch.positions_T), shape.q_heads, shape.head_dim)

    def taken(settings: Settings) -> float:
        def blocks(*args: Any) -> tuning.AttentionBlocks:  # noqa: ANN401
            return replace(tuning.attention_blocks(*args), **settings)

        with mock.patch.object(backend, "attention_blocks", blocks):
            return benches.seconds(at, lambda: ops.paged_attention(q, 0.1, kv, 0, batch))

    return taken


def fastest(choices: Iterator[Settings], taken: Callable[[Settings], float]) -> Settings | None:
    """The choice with the least time; None where none runs."""
    best: tuple[float, Settings] | None = None
    for choice in choices:
        try:
            time_s = taken(choice)
        except Exception as error:  # too much shared memory, or registers
            print(f"no time for {choice}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if best is None or time_s < best[0]:
            best = time_s, choice
    return None if best is None else best[1]


TUNERS: dict[str, Callable[[Where, Machine], Result]] = {
    "tuning of attention": attention,
    "tuning of products": products,
}
