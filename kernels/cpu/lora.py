"""Adapters of a product or of a layer's products, as C++ reads them.

Knows pointers of banks and rows; knows nothing of the computation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arriero.kernels.cpu.library import LayerLora, Lora, LoraParts, LoraRows
from arriero.kernels.cpu.weights import TYPES
from arriero.kernels.layers import DenseLayer
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
    if x_TI.shape[1] != banks[0].in_features:
        raise ValueError(
            f"add_lora: rows of shape {tuple(x_TI.shape)}; expected {banks[0].in_features} inputs"
        )
    x_TI = x_TI.float()
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    if y_TO.dtype != torch.float32 or y_TO.stride(1) != 1 or y_TO.shape[0] != x_TI.shape[0]:
        raise ValueError(
            f"add_lora: y must be float32 rows, as many as x has: {tuple(y_TO.shape)} {y_TO.dtype}"
        )
    structs, c_rows = _structs(banks), rows_struct(rows, x_TI.shape[0])
    ops.call(
        "lora",
        ctypes.addressof(structs),
        len(banks),
        x_TI.data_ptr(),
        x_TI.stride(0),
        x_TI.shape[0],
        y_TO.data_ptr(),
        y_TO.stride(0),
        ctypes.addressof(c_rows),
    )


def rows_struct(rows: AdapterRows, num_rows: int) -> LoraRows:
    """The struct of the rows of a batch; `rows` must outlive the call that uses it.

    Raises:
        ValueError: the rows are of a batch of another size.
    """
    if rows.slot_T.shape != (num_rows,) or rows.slot_T.dtype != torch.int32:
        raise ValueError(
            f"adapters: slots of {tuple(rows.slot_T.shape)} {rows.slot_T.dtype} for {num_rows} rows"
        )
    return LoraRows(
        order=rows.order_X.ctypes.data,
        runs=rows.runs_N3.ctypes.data,
        num_ordered=len(rows.order_X),
        num_runs=len(rows.runs_N3),
    )


def layer_lora(layer: DenseLayer) -> tuple[LayerLora, tuple[object, ...]] | None:
    """The struct of a layer's adapters, and the objects that it points to; None without adapters.

    The banks stay where they are while adapters in their slots change.
    """
    if layer.lora is None:
        return None
    products = {name: layer.lora.of(name) for name in ("qkv", "o", "gate_up", "down")}
    arrays = {name: _structs(banks) for name, banks in products.items() if banks}
    parts = {
        name: LoraParts(parts=ctypes.addressof(array), count=len(array))
        for name, array in arrays.items()
    }
    return LayerLora(**parts), tuple(arrays.values())


def _structs(banks: Sequence[LoraBank]) -> ctypes.Array[Lora]:
    return (Lora * len(banks))(*(_struct(bank) for bank in banks))


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
