"""Products, norms and the vocabulary, in plain torch.

Knows matrices; refuses to know sequences and caches. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels.ops import Linear, Vocab

_UPCAST_ELEMENTS = 1 << 24
"""At most so many weights are held in float32 at a time: a big head is not copied whole."""


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


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The product x Wᵀ + b.

    On CPU: x is rounded to the weights' dtype, sums and result are float32. On CUDA: all in the
    weights' dtype, as the library's product accumulates.
    """
    x_TI = x_TI.to(weight_OI.dtype)
    if weight_OI.is_cuda:
        return F.linear(x_TI, weight_OI, None if bias_O is None else bias_O.to(weight_OI.dtype))
    if weight_OI.dtype == torch.float32:
        return F.linear(x_TI, weight_OI, bias_O)
    rows = max(1, _UPCAST_ELEMENTS // max(1, weight_OI.shape[1]))
    x_TI = x_TI.float()
    y_TO = torch.cat([F.linear(x_TI, w.float()) for w in torch.split(weight_OI, rows)], dim=1)
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def embed(tokens_T: Tensor, vocab: Vocab) -> Tensor:
    """Rows of the table; zeros where the token's row is not held here."""
    row_T = tokens_T.long() - vocab.first_row
    held_T = (row_T >= 0) & (row_T < vocab.num_rows)
    x_TH: Tensor = vocab.packed[row_T.where(held_T, 0)]
    if not x_TH.is_cuda:
        x_TH = x_TH.float()
    return x_TH.masked_fill_(~held_T[:, None], 0)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Normalise in float32, round to x's dtype, then multiply: the order of the checkpoints."""
    x32_TH = x_TH.float()
    x32_TH = x32_TH * torch.rsqrt(x32_TH.pow(2).mean(-1, keepdim=True) + eps)
    return weight_H.to(x_TH.dtype) * x32_TH.to(x_TH.dtype)


def silu_mul(gate_up_TF2: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
