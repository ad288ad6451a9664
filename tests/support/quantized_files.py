"""Tiny matrices in the layouts that quantized checkpoints ship in, written number by number.

Slow and plain on purpose: nothing here shares code with the readers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

AWQ_COLUMN_OF_NIBBLE = [0, 2, 4, 6, 1, 3, 5, 7]

Matrix = npt.NDArray[np.float64]


def _word(numbers: list[int], bits: int = 4) -> int:
    value = sum(one << (bits * i) for i, one in enumerate(numbers))
    return value - (1 << 32) if value >= 1 << 31 else value


def fp8(
    name: str, rows: int, columns: int, seed: int, scale_dtype: torch.dtype
) -> tuple[dict[str, Tensor], Matrix]:
    """`weight` and `weight_scale`, and the matrix that they mean."""
    generator = torch.Generator().manual_seed(seed)
    data = (torch.randn(rows, columns, generator=generator) * 100).to(torch.float8_e4m3fn)
    scale = (torch.rand(rows, 1, generator=generator) + 0.01).to(scale_dtype)
    full = np.zeros((rows, columns))
    for o in range(rows):
        for i in range(columns):
            full[o, i] = float(data[o, i]) * float(scale[o, 0])
    return {f"{name}.weight": data, f"{name}.weight_scale": scale}, full


def eight_bits(
    name: str, rows: int, columns: int, seed: int, *, float8: bool, per_tensor: bool, scale: str
) -> tuple[dict[str, Tensor], Matrix]:
    """`weight` in 8 bits with one scale a row or a matrix, and the matrix that they mean."""
    generator = torch.Generator().manual_seed(seed)
    if float8:
        data = (torch.randn(rows, columns, generator=generator) * 100).to(torch.float8_e4m3fn)
    else:
        data = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(1 if per_tensor else rows, 1, generator=generator) + 0.01
    full = np.zeros((rows, columns))
    for o in range(rows):
        for i in range(columns):
            full[o, i] = float(data[o, i]) * float(scales[0 if per_tensor else o, 0])
    return {f"{name}.weight": data, f"{name}.{scale}": scales[0] if per_tensor else scales}, full


def packed(
    name: str,
    rows: int,
    columns: int,
    group: int,
    seed: int,
    bits: int,
    zeros: bool,
    order_seed: int | None = None,
) -> tuple[dict[str, Tensor], Matrix]:
    """compressed-tensors' `weight_packed` and its fellows, and the matrix that they mean.

    With an `order_seed` columns are in groups by chance, and `weight_g_idx` says in which.
    """
    random = np.random.default_rng(seed)
    q = random.integers(0, 1 << bits, (rows, columns))
    z = random.integers(0, 16, (rows, columns // group)) if zeros else None
    s = torch.tensor(random.uniform(0.001, 0.1, (rows, columns // group)), dtype=torch.bfloat16)
    g_idx = np.arange(columns) // group
    if order_seed is not None:
        g_idx = np.random.default_rng(order_seed).permutation(g_idx)
    each = 32 // bits
    words = [
        [_word([int(one) for one in q[o, i : i + each]], bits) for i in range(0, columns, each)]
        for o in range(rows)
    ]
    tensors = {
        f"{name}.weight_packed": torch.tensor(words, dtype=torch.int32),
        f"{name}.weight_scale": s,
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }
    if order_seed is not None:
        tensors[f"{name}.weight_g_idx"] = torch.tensor(g_idx, dtype=torch.int32)
    if z is not None:
        tensors[f"{name}.weight_zero_point"] = torch.tensor(
            [
                [_word([int(z[8 * w + k, g]) for k in range(8)]) for g in range(z.shape[1])]
                for w in range(rows // 8)
            ],
            dtype=torch.int32,
        )
    full = np.zeros((rows, columns))
    for o in range(rows):
        for i in range(columns):
            middle = (1 << bits - 1) if z is None else z[o, g_idx[i]]
            full[o, i] = (q[o, i] - middle) * float(s[o, g_idx[i]])
    return tensors, full


def awq(
    name: str, rows: int, columns: int, group: int, seed: int
) -> tuple[dict[str, Tensor], Matrix]:
    """`qweight`, `qzeros` and `scales`, and the matrix that they mean."""
    q, z, s = _numbers(rows, columns, -(-columns // group), seed)
    qweight = [
        [_word([int(q[i, 8 * w + c]) for c in AWQ_COLUMN_OF_NIBBLE]) for w in range(rows // 8)]
        for i in range(columns)
    ]
    qzeros = [
        [_word([int(z[g, 8 * w + c]) for c in AWQ_COLUMN_OF_NIBBLE]) for w in range(rows // 8)]
        for g in range(len(z))
    ]
    full = np.zeros((rows, columns))
    for o in range(rows):
        for i in range(columns):
            full[o, i] = (q[i, o] - z[i // group, o]) * float(s[i // group, o])
    return {
        f"{name}.qweight": torch.tensor(qweight, dtype=torch.int32),
        f"{name}.qzeros": torch.tensor(qzeros, dtype=torch.int32),
        f"{name}.scales": s,
    }, full


def gptq(
    name: str,
    rows: int,
    columns: int,
    group: int,
    seed: int,
    *,
    act_order: bool,
    version: int,
    order_seed: int | None = None,
) -> tuple[dict[str, Tensor], Matrix]:
    """`qweight`, `qzeros`, `scales` and `g_idx`, and the matrix that they mean.

    Products of the same inputs have one order: give them the same `order_seed`.
    """
    q, z, s = _numbers(rows, columns, columns // group, seed)
    g_idx = np.arange(columns) // group
    if act_order:
        g_idx = np.random.default_rng(seed if order_seed is None else order_seed).permutation(g_idx)
    qweight = [
        [_word([int(q[8 * w + k, o]) for k in range(8)]) for o in range(rows)]
        for w in range(columns // 8)
    ]
    less = 1 if version == 1 else 0
    qzeros = [
        [_word([(int(z[g, 8 * w + k]) - less) % 16 for k in range(8)]) for w in range(rows // 8)]
        for g in range(len(z))
    ]
    full = np.zeros((rows, columns))
    for o in range(rows):
        for i in range(columns):
            full[o, i] = (q[i, o] - z[g_idx[i], o]) * float(s[g_idx[i], o])
    return {
        f"{name}.qweight": torch.tensor(qweight, dtype=torch.int32),
        f"{name}.qzeros": torch.tensor(qzeros, dtype=torch.int32),
        f"{name}.scales": s,
        f"{name}.g_idx": torch.tensor(g_idx, dtype=torch.int32),
    }, full


def _numbers(
    rows: int, columns: int, groups: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Tensor]:
    random = np.random.default_rng(seed)
    q = random.integers(0, 16, (columns, rows))
    z = random.integers(0, 16, (groups, rows))
    scales = torch.tensor(random.uniform(0.001, 0.1, (groups, rows)), dtype=torch.float16)
    return q, z, scales
