"""The floors of top-k and top-p: the least weight that each keeps, row by row.

The k-th greatest weight, or the last one above which lies less than p of all, is found digit by
digit from the highest: each pass sums what lies in each of 2**BITS ranges, in every chunk at
once, and the next goes on inside the range that holds the floor. Sums are integers, so their
order changes no bit.

Knows integer weights; refuses to know where they come from. Shape legend: R rows, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.ops import SamplingRows
from arriero.kernels.reference.sampling import FRACTION_BITS
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
    """What passes 0 .. step - 1 found, from the state before the last of them and its sums.

    Returns the digits so far, the sum of what lies above them, and the limit it stays under.
    """
    RANGES: tl.constexpr = 1 << BITS
    kept = row < num_rows
    prefix = tl.zeros(row.shape, tl.int64)
    above = tl.zeros(row.shape, tl.int64)
    if step > 0:
        before = (step - 1) * num_rows + row
        prefix = tl.load(prefixes + before, mask=kept, other=0)
        above = tl.load(aboves + before, mask=kept, other=0)
        digit = tl.arange(0, RANGES)[None, None, :]
        chunk = tl.arange(0, CHUNKS)[None, :, None]
        line = ((step - 1) * num_rows + row).to(tl.int64)[:, None, None] * num_chunks + chunk
        held = kept[:, None, None] & (chunk < num_chunks) & (digit >= 0)
        sums = tl.sum(tl.load(bins + line * RANGES + digit, mask=held, other=0), 1)
        total = tl.sum(sums, 1)
        if BY_MASS:
            if step == 1:
                limit = limit * total.to(tl.float64)
            else:
                limit = tl.load(limits + before, mask=kept, other=0.0)
        over = above[:, None] + total[:, None] - tl.cumsum(sums, 1)
        under = over.to(tl.float64) < limit[:, None]
        digits = tl.broadcast_to(tl.arange(0, RANGES)[None, :], under.shape)
        # the highest range has above it what the passes before found under the limit
        found = tl.min(tl.where(under, digits, RANGES - 1), 1)
        above = tl.sum(tl.where(digits == found[:, None], over, 0), 1)
        prefix = prefix * RANGES + found
    return prefix, above, limit


@kernel
def _narrow(
    weights: tl.tensor,
    temperature: tl.tensor,
    wanted: tl.tensor,
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
    """Pass `step` of the search for a filter's floor; the pass after the last writes it."""
    RANGES: tl.constexpr = 1 << BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = row < num_rows
    lower = tl.load(floor_in + row, mask=kept, other=0)
    if BY_MASS:
        limit = tl.load(wanted + row, mask=kept, other=1.0).to(tl.float64)
        filters = limit < 1.0
    else:
        limit = tl.load(wanted + row, mask=kept, other=0).to(tl.float64)
        filters = limit > 0
    filters = filters & (tl.load(temperature + row, mask=kept, other=0.0) > 0)
    last = step == PASSES
    lead = tl.program_id(1) == 0
    if tl.max(filters.to(tl.int32), 0) == 0:
        if last & lead:
            tl.store(floor_out + row, lower, mask=kept)
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
    if last:
        if lead:
            floor = tl.where(filters, tl.maximum(prefix, lower), lower)
            tl.store(floor_out + row, floor, mask=kept)
        return
    if lead:
        tl.store(prefixes + step * num_rows + row, prefix, mask=kept)
        tl.store(aboves + step * num_rows + row, above, mask=kept)
        if BY_MASS:
            tl.store(limits + step * num_rows + row, limit, mask=kept)
    token = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK))[None, :]
    held = kept[:, None] & (token < size)
    at = weights + row.to(tl.int64)[:, None] * size + token
    weight = tl.load(at, mask=held, other=0)
    shift = (PASSES - 1 - step) * BITS
    high = weight >> shift
    inside = held & (weight >= lower[:, None]) & ((high >> BITS) == prefix[:, None])
    digit = tl.where(inside, high & (RANGES - 1), -1)
    line = (step * num_rows + row).to(tl.int64) * num_chunks + tl.program_id(1)
    for value in tl.static_range(RANGES):
        if BY_MASS:
            found = tl.sum(tl.where(digit == value, weight, 0), 1)
        else:
            found = tl.sum((digit == value).to(tl.int64), 1)
        tl.store(bins + line * RANGES + value, found, mask=kept)


def floor(
    weights_RV: Tensor,
    rows: SamplingRows,
    wanted_R: Tensor,
    by_mass: bool,
    floor_R: Tensor,
    cut: LogitTiles,
) -> Tensor:
    """The least weight that top-k (or by mass, top-p) keeps in each row, at least `floor_R`."""
    device = weights_RV.device
    shape = (PASSES, cut.num_rows)
    bins = torch.empty(*shape, cut.chunks, 1 << BITS, dtype=torch.int64, device=device)
    prefixes = torch.empty(shape, dtype=torch.int64, device=device)
    aboves = torch.empty(shape, dtype=torch.int64, device=device)
    limits = torch.empty(shape, dtype=torch.float64, device=device)
    floor_out_R = torch.empty_like(floor_R)
    for step in range(PASSES + 1):
        last = step == PASSES
        _narrow[(cut.row_programs, 1 if last else cut.chunks)](
            weights_RV,
            rows.temperature_R,
            wanted_R,
            floor_R,
            bins,
            prefixes,
            aboves,
            limits,
            floor_out_R,
            cut.num_rows,
            cut.size,
            cut.chunks,
            step,
            BY_MASS=by_mass,
            PASSES=PASSES,
            BITS=BITS,
            ROWS=cut.rows,
            CHUNK=cut.chunk,
            CHUNKS=cut.chunks_power,
            **EXACT,
        )
    return floor_out_R
