"""Matrix products, norms and the vocabulary, in plain torch.

Knows matrices; knows nothing of sequences and caches. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels.input_transform import rounded
from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.quantized_weight import QuantizedWeight, stack

if TYPE_CHECKING:
    from arriero.kernels.ops import Ops

_UPCAST_ELEMENTS = 1 << 24
"""Largest number of weights in float32 at a time: a large head never exists in float32 whole."""


def pack_linear(
    weights_OI: Sequence[Tensor], bias_O: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Linear:
    """Stack by rows; `packed` is the plain matrix [O, I]."""
    out_features = sum(w.shape[0] for w in weights_OI)
    in_features = weights_OI[0].shape[1]
    packed = torch.empty(out_features, in_features, dtype=dtype, device=device)
    row = 0
    for w in weights_OI:
        packed[row : row + w.shape[0]].copy_(w)
        row += w.shape[0]
    bias = None if bias_O is None else bias_O.to(device, torch.float32, copy=True)
    nbytes = packed.nbytes + (0 if bias is None else bias.nbytes)
    return Linear(
        out_features=out_features,
        in_features=in_features,
        packed=packed,
        bias=bias,
        nbytes=nbytes,
    )


def pack_vocab(
    weight_VH: Tensor, first_row: int, dtype: torch.dtype, device: torch.device
) -> Vocab:
    """`packed` is the plain matrix [V, H]."""
    packed = weight_VH.to(device, dtype, copy=True).contiguous()
    return Vocab(
        first_row=first_row,
        num_rows=packed.shape[0],
        hidden_size=packed.shape[1],
        packed=packed,
        nbytes=packed.nbytes,
    )


def pack_quantized(
    weights: Sequence[QuantizedWeight], bias_O: Tensor | None, device: torch.device
) -> Linear:
    """`packed` is the stacked `QuantizedWeight`."""
    packed = stack(list(weights)).to(device)
    bias = None if bias_O is None else bias_O.to(device, torch.float32, copy=True)
    return Linear(
        out_features=packed.out_features,
        in_features=packed.in_features,
        packed=packed,
        bias=bias,
        nbytes=packed.nbytes + (0 if bias is None else bias.nbytes),
    )


def pack_quantized_vocab(weight: QuantizedWeight, first_row: int, device: torch.device) -> Vocab:
    """`packed` is the `QuantizedWeight`."""
    packed = stack([weight]).to(device)
    return Vocab(
        first_row=first_row,
        num_rows=packed.out_features,
        hidden_size=packed.in_features,
        packed=packed,
        nbytes=packed.nbytes,
    )


def matmul(x_TI: Tensor, weight: Tensor | QuantizedWeight, bias_O: Tensor | None = None) -> Tensor:
    """The product x Wᵀ + b.

    On CPU: x is rounded to the weights' dtype, unless the weights are quantized; sums and result
    are float32. On CUDA: in the weights' dtype (quantized: in x's dtype), as the library sums.
    """
    out_features, in_features = (
        weight.shape
        if isinstance(weight, Tensor)
        else (
            weight.out_features,
            weight.in_features,
        )
    )
    dtype = weight.dtype if isinstance(weight, Tensor) else x_TI.dtype
    work = dtype if x_TI.is_cuda else torch.float32
    x_TI = x_TI.to(dtype).to(work)
    step = max(1, _UPCAST_ELEMENTS // max(1, in_features))
    if isinstance(weight, Tensor) and weight.dtype == work:
        step = out_features
    parts = [
        F.linear(x_TI, _full(weight, row, min(row + step, out_features)).to(work))
        for row in range(0, out_features, step)
    ]
    y_TO = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return y_TO if bias_O is None else y_TO.add_(bias_O.to(work))


def transformed_matmul(ops: Ops, x_TI: Tensor, w: Linear) -> Tensor:
    """The product for a `Linear` with `inputs`; see `Ops.pack_transformed`.

    Sums of rounded inputs are exact.
    """
    inputs, weight = w.inputs, w.packed
    assert inputs is not None and isinstance(weight, QuantizedWeight), "made by pack_transformed"
    x = x_TI if inputs.order_I is None else x_TI.index_select(1, inputs.order_I)
    if not inputs.rounds:
        y_TO = matmul(x, weight)
    else:
        q_TI, scale_T1 = rounded(ops, x, inputs)
        wide_TI = q_TI.double()
        step = max(1, _UPCAST_ELEMENTS // weight.in_features)
        sums = []
        for row in range(0, weight.out_features, step):
            part = weight.rows(row, row + step)
            w_OI = part.levels() if weight.row_scales is None else part.without_row_scales()
            sums.append((wide_TI @ w_OI.double().T).float())
        scales_O1 = weight.scales if weight.row_scales is None else weight.row_scales
        y_TO = torch.cat(sums, dim=1).mul_(scale_T1).mul_(scales_O1[:, 0])
    return (y_TO if w.bias is None else y_TO.add_(w.bias)).to(x_TI.dtype)


def _full(weight: Tensor | QuantizedWeight, start: int, stop: int) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[start:stop]
    return weight.rows(start, stop).dequantize()


def embed(tokens_T: Tensor, vocab: Vocab) -> Tensor:
    """Rows of the table; zeros for a token with a row on another slice."""
    row_T = tokens_T.long() - vocab.first_row
    local_T = (row_T >= 0) & (row_T < vocab.num_rows)
    row_T = row_T.where(local_T, 0)
    table: Tensor | QuantizedWeight = vocab.packed
    if isinstance(table, QuantizedWeight):
        zeros = None if table.zeros is None else table.zeros[row_T]
        data = table.data.view(torch.uint8)[row_T].view(table.data.dtype)
        row_scales = None if table.row_scales is None else table.row_scales[row_T]
        rows = replace(
            table, data=data, scales=table.scales[row_T], zeros=zeros, row_scales=row_scales
        )
        x_TH = rows.dequantize().to(torch.bfloat16 if data.is_cuda else torch.float32)
    else:
        x_TH = table[row_T] if table.is_cuda else table[row_T].float()
    return x_TH.masked_fill_(~local_T[:, None], 0)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Normalise in float32, round to x's dtype, then multiply: the order in training."""
    x32_TH = x_TH.float()
    x32_TH = x32_TH * torch.rsqrt(x32_TH.pow(2).mean(-1, keepdim=True) + eps)
    return weight_H.to(x_TH.dtype) * x32_TH.to(x_TH.dtype)


def silu_mul(gate_up_TF2: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
