"""Tiny matrices in ModelOpt's layouts, and roundings of inputs, written out in float64.

Nothing here shares code with the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""Values of the codes 0 .. 7; codes 8 .. 15 are their negatives."""


def nvfp4(name: str, rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """`weight`, `weight_scale_2` and `weight_scale`, and the matrix that they mean, float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    groups = (torch.rand(rows, columns // 16, generator=generator) * 400 + 1).to(
        torch.float8_e4m3fn
    )
    whole = torch.rand((), generator=generator) * 1e-3
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    full = values[codes] * groups.double().repeat_interleave(16, 1) * whole.double()
    tensors = {
        f"{name}.weight": (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8),
        f"{name}.weight_scale_2": whole,
        f"{name}.weight_scale": groups,
    }
    return tensors, full


def float8(name: str, rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """`weight` and `weight_scale`, and the matrix that they mean, float64."""
    generator = torch.Generator().manual_seed(seed)
    data = (torch.randn(rows, columns, generator=generator) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand((), generator=generator) + 0.01
    full = data.double() * scale.double()
    return {f"{name}.weight": data, f"{name}.weight_scale": scale}, full


def fused(parts: dict[str, list[dict[str, Tensor]]], prefix: str) -> dict[str, Tensor]:
    """Experts in two tensors, as ModelOpt exports Llama 4.

    Args:
        parts: for `gate_proj`, `up_proj` and `down_proj` the tensors of each expert, by suffix.
        prefix: name of the experts.
    """
    tensors = {}
    for name, members in (
        ("gate_up_proj", ("gate_proj", "up_proj")),
        ("down_proj", ("down_proj",)),
    ):
        for suffix in parts[members[0]][0]:
            ends = {"weight": name, "input_scale": f"{name}_input_scale"}
            key = f"{prefix}.{ends.get(suffix, f'{name}_{suffix}')}"
            stacked = [torch.stack([one[suffix] for one in parts[member]]) for member in members]
            if stacked[0].dim() == 1:  # a number: that of all experts
                tensors[key] = stacked[0][0]
                continue
            joined = [one.mT.contiguous().view(torch.uint8) for one in stacked]
            tensors[key] = torch.cat(joined, -1).contiguous().view(stacked[0].dtype)
    return tensors


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    """The nearest numbers of a sorted grid, float64; the last ones beyond its ends."""
    middles = (grid[1:] + grid[:-1]) / 2
    return grid[torch.searchsorted(middles, x)]


def _float8_grid() -> Tensor:
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    return numbers[numbers.isfinite()].unique()


FLOAT8 = _float8_grid()
FP4 = torch.tensor([*(-value for value in E2M1[:0:-1]), *E2M1]).double()


def float8_inputs(x: Tensor, scale: Tensor) -> Tensor:
    """Inputs rounded to float8 with a static scale."""
    return nearest(x / scale, FLOAT8) * scale


def int8_inputs(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Inputs rounded to int8 with a static scale, or with a scale for each row (None)."""
    if scale is None:
        scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127) * scale


def nvfp4_inputs(x: Tensor, scale: Tensor) -> Tensor:
    """Inputs rounded to e2m1, with a float8 scale for each 16 of them."""
    x = x.unflatten(-1, (-1, 16))
    group = nearest(x.abs().amax(-1, keepdim=True) / 6 / scale, FLOAT8)
    assert bool((group > 0).all()), "groups of zeros are another test's"
    unit = group * scale
    return (nearest(x / unit, FP4) * unit).flatten(-2)
