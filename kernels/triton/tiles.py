"""A tile of a product with weights of any kind: columns in ascending order, sums in float32.

The tile of some columns is the part that a program computes of a product whose columns are split.
Levels of quantized weights are multiplied as they are (exact in bfloat16). A group's scale belongs
to its sum; the scale of a row of int8 and float8 belongs to the whole sum, and the caller applies
it. Rows and outputs past the last repeat the last; the caller does not store them.

Knows addresses and blocks; knows nothing of launches. Shape legend: M rows, O outputs, K inputs of
a step.
"""

from __future__ import annotations

import triton.language as tl
from arriero.kernels.triton.four_bit_sizes import PANEL, PLANES
from arriero.kernels.triton.launch import kernel
from arriero.kernels.triton.levels import COMPILED, four_bit_levels

_PANEL = tl.constexpr(PANEL)
_PLANES = tl.constexpr(PLANES)


@kernel
def _load_x(
    x: tl.tensor,
    row_M: tl.tensor,
    column_K: tl.tensor,
    valid_K: tl.tensor,
    score_M: tl.tensor,
    SCORED: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Inputs [M, K]; a row times its score is rounded to the dtype of x."""
    at = x + row_M[:, None] + column_K[None, :]
    if EVEN:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=valid_K[None, :], other=0.0)
    if SCORED:
        value = (value.to(tl.float32) * score_M[:, None]).to(x.dtype.element_ty)
    return value.to(DOT)


@kernel
def multiply(
    x: tl.tensor,
    row_M: tl.tensor,
    score_M: tl.tensor,
    data: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    output_O: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    first_step: tl.tensor,
    stop_step: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCORED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """The sum [M, O] over the columns of steps first_step .. stop_step - 1, in float32.

    `row_M` are offsets of rows of x, in elements. A step is BLOCKS blocks of four-bit weights with
    PLANES planes of each group, and BLOCK_K columns of others. EVEN: no step and no plane goes
    beyond the last column.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last_O = tl.minimum(output_O, num_outputs - 1)
    if KIND == "int4" or KIND == "fp4":
        GROUPS: tl.constexpr = _PLANES // PLANES
        SIZE: tl.constexpr = _PANEL * ((GROUP + PLANES - 1) // PLANES)
        num_blocks = tl.cdiv(num_inputs, GROUP * GROUPS)
        row_O = data + (last_O // _PANEL).to(tl.int64) * (num_blocks * SIZE)
        row_O += last_O % _PANEL * (SIZE // _PANEL)
        for step in range(first_step, stop_step):
            for within in tl.static_range(BLOCKS):
                block = step * BLOCKS + within
                stored = block if EVEN else tl.minimum(block, num_blocks - 1)
                acc = _add_block(acc, x, row_M, score_M, row_O + stored * SIZE, scales, zeros,
                                 output_O, num_outputs, num_inputs, block, stored, KIND, GROUP,
                                 PLANES, HAS_ZEROS, SCORED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
                                 DOT)  # fmt: skip
    else:
        row_O = data + last_O.to(tl.int64) * num_inputs
        for step in range(first_step, stop_step):
            column = step * BLOCK_K + tl.arange(0, BLOCK_K)
            valid_K = column < num_inputs
            x_MK = _load_x(x, row_M, column, valid_K, score_M, SCORED, EVEN, DOT)
            at = row_O[:, None] + column[None, :]
            if EVEN:
                w_OK = tl.load(at)
            else:
                w_OK = tl.load(at, mask=valid_K[None, :], other=0.0)
            acc = tl.dot(x_MK, tl.trans(w_OK.to(DOT)), acc, input_precision="ieee")
    return acc


@kernel
def _add_block(
    acc: tl.tensor,
    x: tl.tensor,
    row_M: tl.tensor,
    score_M: tl.tensor,
    words_O: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    output_O: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    block: tl.tensor,
    stored: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCORED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Add the columns of a block, group by group; `words_O` are addresses of the block, by row.

    `stored` is the block or, past the last, the last block: the inputs are 0 there.
    """
    GROUPS: tl.constexpr = _PLANES // PLANES
    WORDS: tl.constexpr = (GROUP + PLANES - 1) // PLANES
    # short tiles have the matrix unit repeat a row's total for each output; see `_add_total`
    WIDTH: tl.constexpr = BLOCK_N if COMPILED and BLOCK_M == 16 else 1
    for group in tl.static_range(GROUPS):
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        for start in tl.static_range(0, WORDS, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            at = words_O[:, None] + j[None, :]
            # the groups of a block load the same words: the compiler keeps one load
            word = tl.load(at) if EVEN else tl.load(at, mask=(j < WORDS)[None, :], other=0)
            levels = four_bit_levels(word, KIND, HAS_ZEROS, DOT)
            for plane in tl.static_range(PLANES):
                within = plane * WORDS + j
                column = (block * GROUPS + group) * GROUP + within
                valid_K = (j < WORDS) & (within < GROUP) & (column < num_inputs)
                x_MK = _load_x(x, row_M, column, valid_K, score_M, SCORED, EVEN, DOT)
                w_OK = levels[group * PLANES + plane]
                part = tl.dot(x_MK, tl.trans(w_OK), part, input_precision="ieee")
                if HAS_ZEROS:
                    total = _add_total(total, x_MK, BLOCK_M, BLOCK_N, BLOCK_K, DOT)
        first = (stored * GROUPS + group) * num_outputs
        group_zeros = zeros + first if HAS_ZEROS else zeros
        valid_O = output_O < num_outputs
        acc = _add_group(
            acc, part, total, scales + first, group_zeros, output_O, valid_O, HAS_ZEROS
        )
    return acc


@kernel
def _add_total(
    total: tl.tensor,
    x_MK: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Add the sums of rows; short tiles get them from the matrix unit, where they are needed."""
    if COMPILED and BLOCK_M == 16:
        ones = tl.full([BLOCK_K, BLOCK_N], 1.0, DOT)
        total = tl.dot(x_MK, ones, total, input_precision="ieee")
    else:
        total += tl.sum(x_MK.to(tl.float32), 1)[:, None]
    return total


@kernel
def _add_group(
    acc: tl.tensor,
    part: tl.tensor,
    total: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    output_O: tl.tensor,
    valid_O: tl.tensor,
    HAS_ZEROS: tl.constexpr,
) -> tl.tensor:
    """Add (part - total * zero) * scale; `scales` and `zeros` are the addresses of the group."""
    if HAS_ZEROS:
        zero_O = tl.load(zeros + output_O, mask=valid_O, other=0.0).to(tl.float32)
        part = tl.fma(total, -zero_O[None, :], part)
    scale_O = tl.load(scales + output_O, mask=valid_O, other=0.0).to(tl.float32)
    return tl.fma(part, scale_O[None, :], acc)
