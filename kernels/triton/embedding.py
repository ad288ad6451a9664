"""Embedding: rows of a slice's part of the table, zeros for tokens of other slices.

Knows packed tables; knows nothing of slices. Shape legend: T tokens, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.packed_weights import Vocab
from arriero.kernels.quantized_weight import INT4_ZERO
from arriero.kernels.triton.four_bit_sizes import PANEL, PLANES
from arriero.kernels.triton.launch import EXACT, INTERPRETED, kernel, power_of_two, rows_per_program
from arriero.kernels.triton.weights import Packed

BLOCK = 1024
_INT4_ZERO = tl.constexpr(INT4_ZERO)
_PANEL = tl.constexpr(PANEL)
_PLANES = tl.constexpr(PLANES)


@kernel
def _embed(
    tokens: tl.tensor,
    data: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    out: tl.tensor,
    num_tokens: tl.tensor,
    first_row: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    row = tl.load(tokens + token, mask=token < num_tokens, other=0) - first_row
    local = (row >= 0) & (row < num_rows)
    read = local & (column < size)
    row = row.to(tl.int64)
    if KIND == "int4":
        WORDS: tl.constexpr = (GROUP + PLANES - 1) // PLANES
        BLOCK_COLUMNS: tl.constexpr = GROUP * (_PLANES // PLANES)
        block, within = column // BLOCK_COLUMNS, column % GROUP
        plane = column % BLOCK_COLUMNS // GROUP * PLANES + within // WORDS
        at = row // _PANEL * tl.cdiv(size, BLOCK_COLUMNS) + block  # of the panel's blocks
        at = data + (at * _PANEL + row % _PANEL) * WORDS + within % WORDS
        word = tl.load(at, mask=read, other=0).to(tl.int32)
        level = ((word >> 4 * plane) & 15).to(tl.float32)
        group = column // GROUP * num_rows + row
        zero = _INT4_ZERO
        if HAS_ZEROS:
            zero = tl.load(zeros + group, mask=read, other=0.0).to(tl.float32)
        scale = tl.load(scales + group, mask=read, other=0.0).to(tl.float32)
        value = (level - zero) * scale
    else:
        value = tl.load(data + row * size + column, mask=read, other=0.0)
        if KIND != "dense":
            value = value.to(tl.float32) * tl.load(scales + row, mask=local, other=0.0)
    to = out + token.to(tl.int64) * size + column
    tl.store(to, value.to(out.dtype.element_ty), mask=(token < num_tokens) & (column < size))


def embed(tokens_T: Tensor, vocab: Vocab) -> Tensor:
    """See `Ops.embed`. float32 on CPU; else the table's dtype, bfloat16 for a quantized table."""
    table: Packed = vocab.packed
    num_tokens, size = tokens_T.shape[0], vocab.hidden_size
    dtype = table.data.dtype if table.kind == "dense" else torch.bfloat16
    if not tokens_T.is_cuda:
        dtype = torch.float32
    out_TH = torch.empty(num_tokens, size, dtype=dtype, device=tokens_T.device)
    block = power_of_two(size) if INTERPRETED else min(BLOCK, power_of_two(size))
    rows = power_of_two(rows_per_program(block))
    if num_tokens:
        _embed[(-(-num_tokens // rows), -(-size // block))](
            tokens_T,
            table.data,
            table.scales,
            table.zeros,
            out_TH,
            num_tokens,
            vocab.first_row,
            vocab.num_rows,
            size,
            KIND=table.kind,
            GROUP=table.group_size,
            PLANES=0 if table.form is None else table.form.planes,
            HAS_ZEROS=table.zeros is not None,
            ROWS=rows,
            BLOCK=block,
            **EXACT,
        )
    return out_TH
