"""Low-rank adapters: y += (x Aᵀ) B, each row with the adapter of its slot.

Two kernels: the sums of a row with the rows of A, then their products with B. A program computes
one row, so that a row's bits do not depend on the other rows; which rows have an adapter, and of
which rank, is read on the device. Knows slots; knows nothing of layers.

Source: the gathered products of Punica (Chen 2023) and S-LoRA (Sheng 2023).
Shape legend: kernels/lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.lora import AdapterRows, LoraBank
from arriero.kernels.triton.launch import EXACT, kernel, power_of_two, unit_stride

_INPUTS = 512
"""Inputs that a program reads at a time."""
_OUTPUTS = 256
"""Outputs of a program."""
_RANKS = 16
"""Ranks that a program reads at a time."""


@kernel
def _lora_shrink(
    x: tl.tensor,
    x_stride: tl.tensor,
    slots: tl.tensor,
    ranks: tl.tensor,
    a: tl.tensor,
    sums: tl.tensor,
    ins: tl.tensor,
    a_stride: tl.tensor,
    max_rank: tl.tensor,
    RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
        used = rank < tl.load(ranks + slot)
        at = a + (slot * max_rank + rank)[:, None] * a_stride
        total = tl.zeros([RANKS], tl.float32)
        for start in range(0, ins, INPUTS):
            column = start + tl.arange(0, INPUTS)
            value = tl.load(x + row * x_stride + column, mask=column < ins, other=0.0)
            valid = used[:, None] & (column < ins)[None, :]
            weight = tl.load(at + column[None, :], mask=valid, other=0.0)
            total += tl.sum(weight.to(tl.float32) * value.to(tl.float32)[None, :], 1)
        tl.store(sums + row * max_rank + rank, total, mask=used)


@kernel
def _lora_expand(
    sums: tl.tensor,
    slots: tl.tensor,
    ranks: tl.tensor,
    b: tl.tensor,
    y: tl.tensor,
    y_stride: tl.tensor,
    outs: tl.tensor,
    b_stride: tl.tensor,
    max_rank: tl.tensor,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        inside = column < outs
        num_ranks = tl.load(ranks + slot)
        total = tl.zeros([OUTPUTS], tl.float32)
        for start in range(0, num_ranks, RANKS):
            rank = start + tl.arange(0, RANKS)
            used = rank < num_ranks
            factor = tl.load(sums + row * max_rank + rank, mask=used, other=0.0)
            at = b + (slot * max_rank + rank)[:, None] * b_stride + column[None, :]
            weight = tl.load(at, mask=used[:, None] & inside[None, :], other=0.0)
            total += tl.sum(weight.to(tl.float32) * factor[:, None], 0)
        changed = inside & (tl.zeros([OUTPUTS], tl.int32) + num_ranks > 0)
        to = y + row * y_stride + column
        before = tl.load(to, mask=changed, other=0.0)
        tl.store(to, (before.to(tl.float32) + total).to(y.dtype.element_ty), mask=changed)


def add(y_TO: Tensor, x_TI: Tensor, banks: Sequence[LoraBank], rows: AdapterRows) -> None:
    """See `Ops.add_lora`; the host does not wait."""
    num_rows = x_TI.shape[0]
    if not num_rows:
        return
    assert y_TO.stride(-1) == 1, "the product is updated in place"
    x_TI = unit_stride(x_TI)
    max_rank = banks[0].a_GRI.shape[1]
    ranks = min(_RANKS, power_of_two(max_rank))
    sums_TR = torch.empty(num_rows, max_rank, dtype=torch.float32, device=x_TI.device)
    for bank in banks:
        _lora_shrink[(num_rows, -(-max_rank // ranks))](
            x_TI,
            x_TI.stride(0),
            rows.slot_T,
            bank.rank_G,
            bank.a_GRI,
            sums_TR,
            bank.in_features,
            bank.a_GRI.stride(1),
            max_rank,
            RANKS=ranks,
            INPUTS=min(_INPUTS, power_of_two(bank.in_features)),
            **EXACT,
        )
        outputs = min(_OUTPUTS, power_of_two(bank.out_features))
        _lora_expand[(num_rows, -(-bank.out_features // outputs))](
            sums_TR,
            rows.slot_T,
            bank.rank_G,
            bank.b_GRO,
            y_TO[:, bank.first :],
            y_TO.stride(0),
            bank.out_features,
            bank.b_GRO.stride(1),
            max_rank,
            RANKS=ranks,
            OUTPUTS=outputs,
            **EXACT,
        )
