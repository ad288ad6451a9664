"""Adapters of a product, by a call of C++.

Knows pointers of banks; knows nothing of layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arriero.kernels.cpu.library import Lora
from arriero.kernels.cpu.structs import float_rows
from arriero.kernels.cpu.weights import TYPES
from arriero.kernels.lora import AdapterRows, LoraBank

if TYPE_CHECKING:
    from arriero.kernels.cpu.backend import CpuOps


def add(
    ops: CpuOps, y_TO: Tensor, x_TI: Tensor, banks: Sequence[LoraBank], rows: AdapterRows
) -> None:
    """Add the adapters' products with x to y; see `Ops.add_lora`.

    Raises:
        ValueError: shapes or types that the kernel cannot take.
    """
    x_TI = float_rows("add_lora", x_TI, banks[0].in_features)
    if y_TO.dtype != torch.float32 or y_TO.stride(1) != 1 or y_TO.shape[0] != x_TI.shape[0]:
        raise ValueError(
            f"add_lora: y must be float32 rows, as many as x has: {tuple(y_TO.shape)} {y_TO.dtype}"
        )
    structs = (Lora * len(banks))(*(_struct(bank) for bank in banks))
    ops.call(
        "lora",
        ctypes.addressof(structs),
        len(banks),
        x_TI.data_ptr(),
        x_TI.stride(0),
        x_TI.shape[0],
        y_TO.data_ptr(),
        y_TO.stride(0),
        rows.order_X.ctypes.data,
        len(rows.order_X),
        rows.runs_N3.ctypes.data,
        len(rows.runs_N3),
    )


def _struct(bank: LoraBank) -> Lora:
    if bank.a_GRI.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"add_lora: {bank.a_GRI.dtype} adapters; use float32 or bfloat16")
    return Lora(
        a=bank.a_GRI.data_ptr(),
        b=bank.b_GRO.data_ptr(),
        ranks=bank.rank_G.data_ptr(),
        slots=bank.num_slots,
        max_rank=bank.a_GRI.shape[1],
        in_features=bank.in_features,
        out_features=bank.out_features,
        first=bank.first,
        type=TYPES[bank.a_GRI.dtype],
    )
