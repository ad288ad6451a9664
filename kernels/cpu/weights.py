"""Packed matrices: allocation, and the structs that C++ reads them by.

Knows the packed layout's sizes (native/matrix.h) and lifetimes; refuses to know layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arriero.kernels.cpu.library import Library, Machine, Matrix

PANEL = 32

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The C++ numbers of the plain types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A packed matrix and what keeps its memory alive."""

    struct: Matrix
    tensors: tuple[Tensor, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes held, padding too."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def address(self) -> int:
        """Where the struct is."""
        return ctypes.addressof(self.struct)


def pad_columns(values_O: Tensor, out_features: int) -> Tensor:
    """Float32, padded with zeros to whole panels."""
    padded = torch.zeros(-(-out_features // PANEL) * PANEL)
    padded[:out_features] = values_O
    return padded


def large_zeros(library: Library, num_bytes: int) -> Tensor:
    """Zeroed bytes, on large pages where the system gives them."""
    data = torch.zeros(num_bytes, dtype=torch.uint8)
    library.advise_large(data.data_ptr(), num_bytes)
    return data


def pack_plain(
    library: Library,
    machine: Machine,
    weights_OI: Sequence[Tensor],
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Packed:
    """Pack matrices, stacked by rows, as `dtype`.

    Raises:
        ValueError: a dtype that has no kernels, or matrices that do not stack.
    """
    if dtype not in TYPES:
        known = ", ".join(str(one)[6:] for one in TYPES)
        raise ValueError(f"dtype={str(dtype)[6:]} has no CPU kernels; use one of {known}")
    if not weights_OI:
        raise ValueError("no weights were given; pass at least one matrix")
    in_features = weights_OI[0].shape[1]
    if any(w.ndim != 2 or w.shape[1] != in_features for w in weights_OI):
        shapes = ", ".join(str(tuple(w.shape)) for w in weights_OI)
        raise ValueError(f"matrices of shapes {shapes} do not stack; they need one `in` size")
    out_features = sum(w.shape[0] for w in weights_OI)
    panels = -(-out_features // PANEL)
    pairs = -(-in_features // 2)
    data = large_zeros(library, panels * pairs * 2 * PANEL * dtype.itemsize)
    tensors = [data]
    struct = Matrix(
        out_features=out_features,
        in_features=in_features,
        data=data.data_ptr(),
        type=TYPES[dtype],
    )
    if bias_O is not None:
        if bias_O.shape != (out_features,):
            raise ValueError(
                f"bias of shape {tuple(bias_O.shape)} for {out_features} outputs; pass one each"
            )
        tensors.append(pad_columns(bias_O.detach(), out_features))
        struct.bias = tensors[-1].data_ptr()
    row = 0
    for w in weights_OI:
        w = w.detach()
        if w.dtype not in TYPES or w.device.type != "cpu":
            w = w.to("cpu", torch.float32)
        library.call(
            "pack",
            machine.handle,
            ctypes.addressof(struct),
            row,
            w.data_ptr(),
            w.shape[0],
            w.stride(0),
            w.stride(1),
            TYPES[w.dtype],
        )
        row += w.shape[0]
    return Packed(struct=struct, tensors=tuple(tensors))
