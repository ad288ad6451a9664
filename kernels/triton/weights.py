"""The packed form of weights in device memory.

Knows matrices; knows nothing of kernels. Shape legend: O rows, I columns, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels.quantized_weight import QuantizedWeight, stack
from arriero.kernels.triton.upload import Upload

Kind = Literal["dense", "int8", "fp8", "int4", "fp4"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A matrix [O, I] on the device.

    Attributes:
        kind: dense, or a `QuantKind`.
        data: dense, int8, fp8: [O, I] as stored. int4, fp4: uint8 [O, G * half], half =
            group_size / 2 rounded up: byte j of a group has column j of the group in the low four
            bits and column half + j in the high four bits, so that kernels read both halves of the
            inputs in order.
        scales: float32 [O, G]; None when dense.
        zeros: float32 [O, G] for int4 with zero points, else None.
        group_size: columns that share a scale.
        bias: [O], in the dtype of the addition; None for none.
    """

    kind: Kind
    data: Tensor
    in_features: int
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group_size: int = 0
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        """O."""
        return self.data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.data, self.scales, self.zeros, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack_dense(
    weights_OI: Sequence[Tensor],
    bias_O: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    upload: Upload,
) -> Packed:
    """Stack by rows and convert, part by part: a second copy of the whole never exists."""
    rows = sum(w.shape[0] for w in weights_OI)
    columns = weights_OI[0].shape[1]
    data = torch.empty(rows, columns, dtype=dtype, device=device)
    row = 0
    for w in weights_OI:
        upload.copy(data[row : row + w.shape[0]], w)
        row += w.shape[0]
    return Packed(kind="dense", data=data, in_features=columns, bias=_bias(bias_O, dtype, device))


def pack_quantized(
    weights: Sequence[QuantizedWeight],
    bias_O: Tensor | None,
    device: torch.device,
    upload: Upload,
) -> Packed:
    """Stack by rows; four-bit kinds get the byte order of `Packed`."""
    whole = stack(list(weights))
    data = whole.data
    scales = whole.scales if whole.row_scales is None else whole.scales * whole.row_scales
    if whole.four_bits:
        data = _halves(whole)
    on_device = torch.empty(data.shape, dtype=data.dtype, device=device)
    upload.copy(on_device.view(torch.uint8), data.view(torch.uint8))
    return Packed(
        kind=whole.kind,
        data=on_device,
        in_features=whole.in_features,
        scales=scales.to(device),
        zeros=None if whole.zeros is None else whole.zeros.to(device),
        group_size=whole.group_size,
        bias=_bias(bias_O, torch.bfloat16, device),
    )


def _bias(bias_O: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if bias_O is None:
        return None
    return bias_O.to(device, dtype if device.type == "cuda" else torch.float32, copy=True)


def _halves(weight: QuantizedWeight) -> Tensor:
    """Bytes of four-bit kinds in the order of `Packed`; columns past the last have level 0."""
    rows, group = weight.data.shape[0], weight.group_size
    q_OI = torch.stack([weight.data & 15, weight.data >> 4], dim=-1).flatten(1)
    q_OI = q_OI[:, : weight.in_features]
    groups = weight.scales.shape[1]
    q_OGC = F.pad(q_OI, (0, groups * group - weight.in_features)).view(rows, groups, group)
    half = -(-group // 2)
    q_OGC = F.pad(q_OGC, (0, 2 * half - group))
    return (q_OGC[..., :half] | q_OGC[..., half:] << 4).flatten(1).contiguous()
