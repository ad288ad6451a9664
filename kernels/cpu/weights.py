"""Packed matrices: memory, and the structs for C++.

Knows the sizes of the packed layout (native/matrix.h) and lifetimes; knows nothing of layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.kernels.cpu.library import Library, Machine, Matrix
from arriero.kernels.cpu.offload import MappedBytes
from arriero.kernels.input_levels import LEVEL_GROUP
from arriero.kernels.quantized_weight import INT4_ZERO, QuantizedWeight

PANEL = 32

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The C++ numbers of plain types."""
INT8, FP8, INT4 = 3, 4, 5
INT8_DOT, INT4_DOT = 6, 7
"""Weights whose inputs are rounded to int8."""
_MAX_WHOLE_ZERO = 128
_FP4_ROWS = 256
"""Rows of fp4 that exist in float32 at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A packed matrix.

    Attributes:
        struct: the struct for C++.
        tensors: memory that the struct points to.
        mapping: the mapped file of the weights; None for weights in memory.
    """

    struct: Matrix
    tensors: tuple[Tensor, ...] = field(repr=False)
    mapping: MappedBytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding included."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def address(self) -> int:
        """Address of the struct."""
        return ctypes.addressof(self.struct)


def large_zeros(num_bytes: int) -> Tensor:
    """Zero bytes, on large pages if the system has large pages.

    The advice must come before the first write, and torch's own zeros would be a write. A page
    costs nothing before its first use, so that a pool of gigabytes is ready at once.
    """
    buffer = mmap.mmap(-1, max(num_bytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=torch.uint8, count=max(num_bytes, 1))[:num_bytes]


def _allocate(num_bytes: int, folder: Path | None) -> tuple[Tensor, MappedBytes | None]:
    if folder is None:
        return large_zeros(num_bytes), None
    mapping = MappedBytes(num_bytes, folder)
    return mapping.data, mapping


def _finish(struct: Matrix, tensors: list[Tensor], mapping: MappedBytes | None) -> Packed:
    if mapping is not None:
        mapping.flush()
    return Packed(struct=struct, tensors=tuple(tensors), mapping=mapping)


def pack_plain(
    library: Library,
    machine: Machine,
    weights_OI: Sequence[Tensor],
    bias_O: Tensor | None,
    dtype: torch.dtype,
    folder: Path | None = None,
) -> Packed:
    """Pack matrices, stacked by rows, as `dtype`; on disk where a folder is given.

    Raises:
        ValueError: the dtype has no kernels, or the matrices do not stack.
    """
    if dtype not in TYPES:
        known = ", ".join(str(dtype)[6:] for dtype in TYPES)
        raise ValueError(f"dtype={str(dtype)[6:]} has no CPU kernels; use one of {known}")
    if not weights_OI:
        raise ValueError("no weights were given; pass at least one matrix")
    in_features = weights_OI[0].shape[1]
    if any(w.ndim != 2 or w.shape[1] != in_features for w in weights_OI):
        shapes = ", ".join(str(tuple(w.shape)) for w in weights_OI)
        raise ValueError(f"matrices of shapes {shapes} do not stack; they need the same `in` size")
    out_features = sum(w.shape[0] for w in weights_OI)
    panels = -(-out_features // PANEL)
    pairs = -(-in_features // 2)
    data, mapping = _allocate(panels * pairs * 2 * PANEL * dtype.itemsize, folder)
    tensors = [data]
    struct = Matrix(
        out_features=out_features,
        in_features=in_features,
        data=data.data_ptr(),
        type=TYPES[dtype],
    )
    _set_bias(struct, tensors, bias_O)
    row = 0
    for w in weights_OI:
        w = w.detach()
        if w.dtype not in TYPES or w.device.type != "cpu":
            w = w.to("cpu", torch.float32)
        _pack_rows(library, machine, struct, row, w, TYPES[w.dtype])
        row += w.shape[0]
    return _finish(struct, tensors, mapping)


_QUANTIZED = {"int8": INT8, "fp8": FP8, "int4": INT4}
_DOT = {"int8": INT8_DOT, "int4": INT4_DOT}


def takes_levels(weight: QuantizedWeight) -> bool:
    """Whether the kernels can multiply a matrix with inputs that are rounded to int8.

    Weights are int8 or int4, and groups of weights do not cut groups of inputs.
    """
    if weight.kind not in _DOT or weight.in_features % LEVEL_GROUP:
        return False
    return weight.scales.shape[1] == 1 or weight.group_size % LEVEL_GROUP == 0


def pack_quantized(
    library: Library,
    machine: Machine,
    weights: Sequence[QuantizedWeight],
    bias_O: Tensor | None,
    folder: Path | None = None,
    *,
    levels: bool = False,
) -> Packed:
    """Pack quantized matrices, stacked by rows; see `pack_plain`.

    The stored numbers are kept, but fp4 becomes bfloat16 (an exact conversion) with row scales.
    With `levels`, products round their inputs to int8, where `takes_levels` says that they can.

    Raises:
        ValueError: the matrices do not stack, an fp8 number is NaN, or int4 groups have odd size.
    """
    if not weights:
        raise ValueError("no weights were given; pass at least one matrix")
    first = weights[0]
    if any(
        (w.kind, w.group_size, w.in_features) != (first.kind, first.group_size, first.in_features)
        for w in weights
    ):
        kinds = {(w.kind, w.group_size, w.in_features) for w in weights}
        raise ValueError(f"stacked weights differ in kind, group or columns: {kinds}")
    if first.kind == "fp4":
        return _pack_fp4(library, machine, weights, bias_O, folder)
    num_groups = first.scales.shape[1]
    kind = (_DOT if levels and takes_levels(first) else _QUANTIZED)[first.kind]
    if first.kind == "int4" and num_groups > 1 and first.group_size % 2:
        raise ValueError(f"group_size={first.group_size} is odd; the CPU kernels need even groups")
    out_features = sum(w.out_features for w in weights)
    pairs = -(-first.in_features // 2)
    panels = -(-out_features // PANEL)
    size = panels * pairs * PANEL * (1 if first.kind == "int4" else 2)
    data, mapping = _allocate(size, folder)
    scales = [w.scales for w in weights]
    zeros = []
    if any(w.zeros is not None for w in weights):
        zeros = [
            torch.full_like(w.scales, INT4_ZERO) if w.zeros is None else w.zeros for w in weights
        ]
    dtype = torch.float16 if all(w.half_scales for w in weights) else torch.float32
    tensors = [data, _columns(scales, dtype)]
    struct = Matrix(
        out_features=out_features,
        in_features=first.in_features,
        data=data.data_ptr(),
        scale=tensors[1].data_ptr(),
        type=kind,
        scale_type=TYPES[dtype],
    )
    if first.kind == "int4":
        struct.group = first.group_size if num_groups > 1 else 2 * pairs
        if zeros:
            tensors.append(_columns(zeros, dtype))
            struct.zero = tensors[-1].data_ptr()
            struct.whole = all(_whole(zero) for zero in zeros)
    _set_bias(struct, tensors, bias_O)
    row = 0
    for w in weights:
        stored = w.data.detach().to("cpu").view(torch.uint8)
        if w.kind == "fp8" and bool(((stored & 0x7F) == 0x7F).any()):
            raise ValueError("fp8 weights contain NaN; the checkpoint is damaged: get it again")
        _pack_rows(library, machine, struct, row, stored, kind)
        row += w.out_features
    return _finish(struct, tensors, mapping)


def _pack_fp4(
    library: Library,
    machine: Machine,
    weights: Sequence[QuantizedWeight],
    bias_O: Tensor | None,
    folder: Path | None,
) -> Packed:
    plain = [
        torch.cat(
            [
                w.rows(row, row + _FP4_ROWS).without_row_scales().to(torch.bfloat16)
                for row in range(0, w.out_features, _FP4_ROWS)
            ]
        )
        for w in weights
    ]
    packed = pack_plain(library, machine, plain, bias_O, torch.bfloat16, folder)
    scale_1O = _columns([w.row_scales for w in weights if w.row_scales is not None])
    packed.struct.scale = scale_1O.data_ptr()
    return replace(packed, tensors=(*packed.tensors, scale_1O))


def _columns(values: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers [O, G] of stacked matrices as [panels, G, columns of a panel], padded with zeros."""
    value_OG = torch.cat([v.detach().to("cpu", torch.float32) for v in values])
    out_features, num_groups = value_OG.shape
    padded = torch.zeros(-(-out_features // PANEL) * PANEL, num_groups, dtype=dtype)
    padded[:out_features] = value_OG
    return padded.view(-1, PANEL, num_groups).transpose(1, 2).contiguous()


def _whole(zeros: Tensor) -> bool:
    """Whether bf16 represents each difference of an int4 level and a zero point exactly."""
    return bool(((zeros == zeros.round()) & (zeros.abs() <= _MAX_WHOLE_ZERO)).all())


def _set_bias(struct: Matrix, tensors: list[Tensor], bias_O: Tensor | None) -> None:
    if bias_O is None:
        return
    if bias_O.shape != (struct.out_features,):
        raise ValueError(
            f"bias of shape {tuple(bias_O.shape)} for {struct.out_features} outputs; pass a number "
            "for each output"
        )
    tensors.append(_columns([bias_O[:, None]]))
    struct.bias = tensors[-1].data_ptr()


def _pack_rows(
    library: Library, machine: Machine, struct: Matrix, row: int, source: Tensor, kind: int
) -> None:
    library.call(
        "pack",
        machine.handle,
        ctypes.addressof(struct),
        row,
        source.data_ptr(),
        source.shape[0],
        source.stride(0),
        source.stride(1),
        kind,
    )
