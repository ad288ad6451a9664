"""The floors of top-k and top-p: the smallest weight of each row that a filter keeps.

The floor is the k-th greatest weight, or the smallest weight with less than p of the total above.
Passes determine the floor digit by digit from the highest: a pass sums the weights in each of
2**BITS ranges, in all chunks at once, and the next pass continues within the floor's range. Sums
are integers, so that the order of summation changes no bit.

Knows integer weights; knows nothing of logits. Shape legend: R rows, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.reference.sampling import FRACTION_BITS
from arriero.kernels.sampling_rows import SamplingRows
from arriero.kernels.triton.launch import EXACT, INTERPRETED, kernel
from arriero.kernels.triton.logit_tiles import LogitTiles

BITS = 3 if INTERPRETED else 5
PASSES = -(-(FRACTION_BITS + 1) // BITS)
"""Weights are 0 .. 2**FRACTION_BITS, both included."""


@kernel
def _state_after(
    bins: tl.tensor,
    prefixes: tl.tensor,
    aboves: tl.tensor,
    limits: tl.tensor,
    limit: tl.tensor,
    row: tl.tensor,
    num_rows: tl.tensor,
    num_chunks: tl.tensor,
    step: tl.tensor,
    BY_MASS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> tl.tensor:
    """State after passes 0 .. step - 1, from the state before pass step - 1 and its sums.

    Returns the digits of the floor so far, the sum above these digits, and the limit of the sum.
    """
    RANGES: tl.constexpr = 1 << BITS
    valid_row = row < num_rows
    prefix = tl.zeros(row.shape, tl.int64)
    above = tl.zeros(row.shape, tl.int64)
    if step > 0:
        before = (step - 1) * num_rows + row
        prefix = tl.load(prefixes + before, mask=valid_row, other=0)
        above = tl.load(aboves + before, mask=valid_row, other=0)
        digit = tl.arange(0, RANGES)[None, None, :]
        chunk = tl.arange(0, CHUNKS)[None, :, None]
        line = ((step - 1) * num_rows + row).to(tl.int64)[:, None, None] * num_chunks + chunk
        valid = valid_row[:, None, None] & (chunk < num_chunks) & (digit >= 0)
        sums = tl.sum(tl.load(bins + line * RANGES + digit, mask=valid, other=0), 1)
        total = tl.sum(sums, 1)
        if BY_MASS:
            if step == 1:
                limit = limit * total.to(tl.float64)
            else:
                limit = tl.load(limits + before, mask=valid_row, other=0.0)
        over = above[:, None] + total[:, None] - tl.cumsum(sums, 1)
        under = over.to(tl.float64) < limit[:, None]
        digits = tl.broadcast_to(tl.arange(0, RANGES)[None, :], under.shape)
        # Above the highest range lies the sum that the previous passes left under the limit.
        floor_digit = tl.min(tl.where(under, digits, RANGES - 1), 1)
        above = tl.sum(tl.where(digits == floor_digit[:, None], over, 0), 1)
        prefix = prefix * RANGES + floor_digit
    return prefix, above, limit


@kernel
def _narrow(
    weights: tl.tensor,
    temperature: tl.tensor,
    parameters: tl.tensor,
    floor_in: tl.tensor,
    bins: tl.tensor,
    prefixes: tl.tensor,
    aboves: tl.tensor,
    limits: tl.tensor,
    floor_out: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    num_chunks: tl.tensor,
    step: tl.tensor,
    BY_MASS: tl.constexpr,
    PASSES: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """Pass `step` of the search for a filter's floor; pass PASSES writes the floor."""
    RANGES: tl.constexpr = 1 << BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid_row = row < num_rows
    lower = tl.load(floor_in + row, mask=valid_row, other=0)
    if BY_MASS:
        limit = tl.load(parameters + row, mask=valid_row, other=1.0).to(tl.float64)
        filters = limit < 1.0
    else:
        limit = tl.load(parameters + row, mask=valid_row, other=0).to(tl.float64)
        filters = limit > 0
    filters = filters & (tl.load(temperature + row, mask=valid_row, other=0.0) > 0)
    is_last = step == PASSES
    is_first_chunk = tl.program_id(1) == 0
    if tl.max(filters.to(tl.int32), 0) == 0:
        if is_last & is_first_chunk:
            tl.store(floor_out + row, lower, mask=valid_row)
        return
    prefix, above, limit = _state_after(
        bins,
        prefixes,
        aboves,
        limits,
        limit,
        row,
        num_rows,
        num_chunks,
        step,
        BY_MASS,
        BITS,
        CHUNKS,
    )
    if is_last:
        if is_first_chunk:
            floor = tl.where(filters, tl.maximum(prefix, lower), lower)
            tl.store(floor_out + row, floor, mask=valid_row)
        return
    if is_first_chunk:
        tl.store(prefixes + step * num_rows + row, prefix, mask=valid_row)
        tl.store(aboves + step * num_rows + row, above, mask=valid_row)
        if BY_MASS:
            tl.store(limits + step * num_rows + row, limit, mask=valid_row)
    token = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK))[None, :]
    valid = valid_row[:, None] & (token < size)
    at = weights + row.to(tl.int64)[:, None] * size + token
    weight = tl.load(at, mask=valid, other=0)
    shift = (PASSES - 1 - step) * BITS
    high = weight >> shift
    inside = valid & (weight >= lower[:, None]) & ((high >> BITS) == prefix[:, None])
    digit = tl.where(inside, high & (RANGES - 1), -1)
    line = (step * num_rows + row).to(tl.int64) * num_chunks + tl.program_id(1)
    for value in tl.static_range(RANGES):
        if BY_MASS:
            range_sum = tl.sum(tl.where(digit == value, weight, 0), 1)
        else:
            range_sum = tl.sum((digit == value).to(tl.int64), 1)
        tl.store(bins + line * RANGES + value, range_sum, mask=valid_row)


def floor(
    weights_RV: Tensor,
    rows: SamplingRows,
    parameter_R: Tensor,
    by_mass: bool,
    floor_R: Tensor,
    tiles: LogitTiles,
) -> Tensor:
    """The smallest weight of each row that top-k (by mass: top-p) keeps, at least `floor_R`."""
    device = weights_RV.device
    shape = (PASSES, tiles.num_rows)
    bins = torch.empty(*shape, tiles.chunks, 1 << BITS, dtype=torch.int64, device=device)
    prefixes = torch.empty(shape, dtype=torch.int64, device=device)
    aboves = torch.empty(shape, dtype=torch.int64, device=device)
    limits = torch.empty(shape, dtype=torch.float64, device=device)
    floor_out_R = torch.empty_like(floor_R)
    for step in range(PASSES + 1):
        is_last = step == PASSES
        _narrow[(tiles.row_programs, 1 if is_last else tiles.chunks)](
            weights_RV,
            rows.temperature_R,
            parameter_R,
            floor_R,
            bins,
            prefixes,
            aboves,
            limits,
            floor_out_R,
            tiles.num_rows,
            tiles.size,
            tiles.chunks,
            step,
            BY_MASS=by_mass,
            PASSES=PASSES,
            BITS=BITS,
            ROWS=tiles.rows,
            CHUNK=tiles.chunk,
            CHUNKS=tiles.chunks_power,
            **EXACT,
        )
    return floor_out_R
