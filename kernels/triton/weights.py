"""The packed form of weights in device memory.

Knows matrices; knows nothing of kernels. Shape legend: O rows, I columns, G groups of columns,
P panels of rows, B blocks of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.quantized_weight import FOUR_BITS, QuantizedWeight, stack
from arriero.kernels.triton.four_bit_sizes import PLANES, FourBitForm, four_bit_form
from arriero.kernels.triton.upload import Upload

Kind = Literal["dense", "int8", "fp8", "int4", "fp4"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A matrix [O, I] on the device.

    Attributes:
        kind: dense, or a `QuantKind`.
        data: dense, int8, fp8: [O, I] as stored. int4, fp4: int16 [P, B, 8, words of a block]; see
            `four_bit_sizes`.
        scales: None when dense. int8, fp8: float32 [O, 1]. int4, fp4: [G, O], so that the scales of
            a tile are adjacent; float16 where the weights have `half_scales`, else float32.
        zeros: as the scales, for int4 with zero points, else None.
        group_size: columns that share a scale.
        form: of four-bit kinds.
        bias: [O], in the dtype of the addition; None for none.
    """

    kind: Kind
    data: Tensor
    in_features: int
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group_size: int = 0
    form: FourBitForm | None = None
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        """O."""
        if self.kind in FOUR_BITS:
            assert self.scales is not None, "four-bit weights have scales"
            return self.scales.shape[1]
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
    """Stack by rows; four-bit kinds get the form of `Packed`."""
    whole = stack(list(weights))
    data, scales, zeros = whole.data, whole.scales, whole.zeros
    if whole.row_scales is not None:
        scales = scales * whole.row_scales
    group_size, form = min(whole.group_size, whole.in_features), None
    if whole.four_bits:
        form = four_bit_form(whole.in_features, group_size)
        data = _panels(whole, group_size, form)
        scales = _by_group(scales, whole.half_scales)
        zeros = None if zeros is None else _by_group(zeros, whole.half_scales)
    on_device = torch.empty(data.shape, dtype=data.dtype, device=device)
    upload.copy(on_device.view(torch.uint8), data.view(torch.uint8))
    return Packed(
        kind=whole.kind,
        data=on_device,
        in_features=whole.in_features,
        scales=scales.to(device),
        zeros=None if zeros is None else zeros.to(device),
        group_size=group_size,
        form=form,
        bias=_bias(bias_O, torch.bfloat16, device),
    )


def linear(packed: Packed) -> Linear:
    """The matrix as layers have it."""
    return Linear(
        out_features=packed.out_features,
        in_features=packed.in_features,
        packed=packed,
        bias=packed.bias,
        nbytes=packed.nbytes,
    )


def vocab(packed: Packed, first_row: int) -> Vocab:
    """Vocabulary rows as an embedding or a head has them."""
    return Vocab(
        first_row=first_row,
        num_rows=packed.out_features,
        hidden_size=packed.in_features,
        packed=packed,
        nbytes=packed.nbytes,
    )


def _bias(bias_O: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if bias_O is None:
        return None
    return bias_O.to(device, dtype if device.type == "cuda" else torch.float32, copy=True)


def _by_group(value_OG: Tensor, half: bool) -> Tensor:
    value_GO = value_OG.T.contiguous()
    return value_GO.half() if half else value_GO


def _panels(weight: QuantizedWeight, group_size: int, form: FourBitForm) -> Tensor:
    """Words of four-bit kinds in the form of `Packed`; rows and columns past the last have 0."""
    panels, blocks, panel, words = form.data_shape(weight.out_features)
    rows, groups = panels * panel, blocks * form.groups
    q_OI = torch.stack([weight.data & 15, weight.data >> 4], dim=-1).flatten(1)
    q_OI = q_OI[:, : weight.in_features]
    padding = (0, groups * group_size - weight.in_features, 0, rows - weight.out_features)
    q_OGC = F.pad(q_OI, padding).view(rows, groups, group_size)
    q_OGC = F.pad(q_OGC, (0, form.planes * words - group_size))
    q_OBPj = q_OGC.reshape(rows, blocks, PLANES, words)
    low, high = (q_OBPj[:, :, p] | q_OBPj[:, :, p + 1] << 4 for p in (0, 2))
    words_OBj = torch.stack([low, high], dim=-1).view(torch.int16).squeeze(-1)
    return words_OBj.view(panels, panel, blocks, words).transpose(1, 2).contiguous()
