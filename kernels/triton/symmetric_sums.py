"""The sum of the ranks' parts in one launch, over memory that the ranks share, in rank order.

Each rank copies its part into its own block, tells the others by signals, and reads theirs: all of
them (one-shot), or the rows that the other ranks have summed (two-shot: rank r sums the rows r,
r + N, r + 2N and so on). The second form reads 2 (N - 1) parts of N of the rows in place of N - 1
times the rows, and waits twice. Can be fused with the residual sum and the norm that follow, and
with the rounding of the norm for the product after it.

The bits are those of `sums.add_parts` and `norm.norm_rows`. The kernel waits on the device: it
can be captured in a CUDA graph, and every rank must launch the same sums in the same order.

The interpreter and compiled binaries have been checked; it has not run on GPUs yet. Knows numbers
and addresses; knows nothing of processes. Shape legend: T tokens, H hidden, N ranks, P programs.
"""

from __future__ import annotations

from torch import Tensor

import triton.language as tl
from arriero.kernels import symmetric_memory
from arriero.kernels.rounded_rows import InputRows, Rounding, unrounded
from arriero.kernels.symmetric_memory import SymmetricMemory
from arriero.kernels.triton.float8 import store_rounded
from arriero.kernels.triton.launch import EXACT, kernel, power_of_two, unit_stride
from arriero.kernels.triton.rows_out import rows_out

ONE_SHOT_REGISTERS, TWO_SHOT_REGISTERS = 128, 96
"""Registers of a thread in a sum that ends with rounding; 128 are all that 512 threads can have.
Left to itself the compiler takes as few as 40, and spills in the loop over the rows. A program has
a multiprocessor of its own anyway."""


@kernel
def _meet(
    address: tl.tensor,
    rank: tl.tensor,
    program: tl.tensor,
    epoch: tl.tensor,
    most_polls: tl.tensor,
    RANKS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    """Tell every rank that this program has come to `epoch`, and wait until all ranks have.

    What any thread of this program wrote before is visible to the other ranks' programs after.
    """
    tl.debug_barrier()  # all threads have written before the signals say so
    other = tl.arange(0, SLOTS)
    exists = other < RANKS
    block = tl.load(address + other, mask=exists, other=0)
    none = tl.zeros_like(block)
    theirs = (block + (program * SLOTS + rank) * 8).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(theirs, none + epoch, mask=exists, sem="release", scope="sys")
    own = tl.load(address + rank) + program * SLOTS * 8
    mine = (own + other * 8).to(tl.pointer_type(tl.int64))
    polls = 0
    missing = 1
    while (missing > 0) & ((most_polls == 0) | (polls < most_polls)):
        seen = tl.atomic_add(mine, none, mask=exists, sem="acquire", scope="sys")
        missing = tl.sum((exists & (seen < epoch)).to(tl.int32), 0)
        polls += 1
    tl.debug_barrier()  # no thread reads before the signals were seen


@kernel
def _row(block: tl.tensor, at: tl.tensor, column: tl.tensor, STORED: tl.constexpr) -> tl.tensor:
    """Addresses of the numbers of a row in a block."""
    return tl.multiple_of((block + at).to(tl.pointer_type(STORED)), 16) + column


@kernel
def _ordered_sum(
    address: tl.tensor,
    at: tl.tensor,
    column: tl.tensor,
    valid: tl.tensor,
    RANKS: tl.constexpr,
    STORED: tl.constexpr,
) -> tl.tensor:
    """The sum of a row's parts in rank order, each partial sum rounded."""
    total = tl.load(_row(tl.load(address), at, column, STORED), mask=valid, other=0.0)
    for rank in tl.static_range(1, RANKS):
        part = _row(tl.load(address + rank), at, column, STORED)
        added = tl.load(part, mask=valid, other=0.0)
        total = (total.to(tl.float32) + added.to(tl.float32)).to(STORED)
    return total


@kernel
def _symmetric_sum(
    address: tl.tensor,
    epochs: tl.tensor,
    part: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    num_rows: tl.tensor,
    part_stride: tl.tensor,
    x_stride: tl.tensor,
    rank: tl.tensor,
    region_nbytes: tl.tensor,
    row_nbytes: tl.tensor,
    most_polls: tl.tensor,
    eps: tl.tensor,
    out: tl.tensor,
    levels: tl.tensor,
    scales: tl.tensor,
    static_scale: tl.tensor,
    bound: tl.tensor,
    NORMS: tl.constexpr,
    KEEPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    STATIC: tl.constexpr,
    BOUNDED: tl.constexpr,
    TOGETHER: tl.constexpr,
    DIVIDES: tl.constexpr,
    RANKS: tl.constexpr,
    SIZE: tl.constexpr,
    SIGNALS: tl.constexpr,
    SLOTS: tl.constexpr,
    BUFFERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    first_row = program.to(tl.int64)
    count = (num_rows - program + PROGRAMS - 1) // PROGRAMS
    column = tl.arange(0, BLOCK)[None, :]
    if ROUNDS:  # as in `_rms_norm`
        column = tl.max_contiguous(column, [1, TOGETHER])
    valid = column < SIZE
    stored = part.dtype.element_ty
    epoch = tl.load(epochs + program)
    own = tl.load(address + rank)
    at = SIGNALS + (epoch // 2 % BUFFERS * PROGRAMS + program) * region_nbytes
    for index in range(0, count):
        row = first_row + index * PROGRAMS
        value = tl.load(part + row * part_stride + column, mask=valid, other=0.0)
        tl.store(_row(own, at + index * row_nbytes, column, stored), value, mask=valid)
    _meet(address, rank, program, epoch + 1, most_polls, RANKS, SLOTS)
    if DIVIDES:
        for index in range(0, count):
            if (first_row + index * PROGRAMS) % RANKS == rank:
                place = at + index * row_nbytes
                total = _ordered_sum(address, place, column, valid, RANKS, stored)
                tl.store(_row(own, place, column, stored), total, mask=valid)
        _meet(address, rank, program, epoch + 2, most_polls, RANKS, SLOTS)
    tl.store(epochs + program, epoch + 2)  # not after the loop, which needs all registers
    valid_row = tl.full([1, 1], 1, tl.int1)
    for index in range(0, count):
        row = first_row + index * PROGRAMS
        place = at + index * row_nbytes
        if DIVIDES:
            owner = tl.load(address + row % RANKS)
            value = tl.load(_row(owner, place, column, stored), mask=valid, other=0.0)
        else:
            value = _ordered_sum(address, place, column, valid, RANKS, stored)
        if NORMS:  # as `_rms_norm`
            kept = x + row * x_stride + column
            residual = tl.load(kept, mask=valid, other=0.0)
            value = (residual.to(tl.float32) + value.to(tl.float32)).to(stored)
            tl.store(kept, value, mask=valid)
            wide = value.to(tl.float32)
            mean = tl.sum(wide * wide, 1) / SIZE
            normed = (wide * tl.rsqrt(mean + eps)[:, None]).to(stored).to(tl.float32)
            gain = tl.load(weight + column, mask=valid, other=0.0).to(stored).to(tl.float32)
            value = (normed * gain).to(stored)
        if KEEPS:
            tl.store(out + row * SIZE + column, value, mask=valid)
        if ROUNDS:
            store_rounded(
                value.to(tl.float32),
                row + tl.zeros([1, 1], tl.int64),
                column,
                valid_row,
                valid,
                SIZE,
                levels,
                scales,
                static_scale,
                bound,
                STATIC,
                BOUNDED,
            )


def reduce(
    memory: SymmetricMemory, part_TH: Tensor, *, divides: bool, most_polls: int = 0
) -> Tensor:
    """See `RankSums.reduce`."""
    return unrounded(_launch(memory, part_TH, None, None, 0.0, divides, most_polls, None))


def add_rms_norm(
    memory: SymmetricMemory,
    part_TH: Tensor,
    x_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    *,
    divides: bool,
    rounding: Rounding | None = None,
) -> InputRows:
    """See `RankSums.add_rms_norm`."""
    assert x_TH.stride(-1) == 1, "the residual stream is updated in place"
    assert x_TH.dtype == part_TH.dtype, "the residual has the parts' dtype"
    return _launch(memory, part_TH, x_TH, weight_H, eps, divides, 0, rounding)


def _launch(
    memory: SymmetricMemory,
    part_TH: Tensor,
    x_TH: Tensor | None,
    weight_H: Tensor | None,
    eps: float,
    divides: bool,
    most_polls: int,
    rounding: Rounding | None,
) -> InputRows:
    num_rows, size = part_TH.shape
    row_nbytes = size * part_TH.element_size()
    assert symmetric_memory.holds(memory.buffer_nbytes, num_rows, row_nbytes), (
        "the caller asks `holds`"
    )
    part_TH = unit_stride(part_TH)
    out = rows_out(num_rows, size, part_TH, rounding)
    block = power_of_two(size)
    most_registers = TWO_SHOT_REGISTERS if divides else ONE_SHOT_REGISTERS
    registers = {} if rounding is None else {"maxnreg": most_registers}
    if num_rows:
        _symmetric_sum[(min(num_rows, symmetric_memory.PROGRAMS),)](
            memory.address_N,
            memory.epoch_P,
            part_TH,
            x_TH,
            weight_H,
            num_rows,
            part_TH.stride(0),
            0 if x_TH is None else x_TH.stride(0),
            memory.rank,
            memory.region_nbytes,
            symmetric_memory.stored_nbytes(row_nbytes),
            most_polls,
            eps,
            **out.arguments,
            NORMS=x_TH is not None,
            DIVIDES=divides,
            RANKS=memory.size,
            SIZE=size,
            SIGNALS=symmetric_memory.SIGNALS_NBYTES,
            SLOTS=symmetric_memory.SIGNAL_SLOTS,
            BUFFERS=symmetric_memory.BUFFERS,
            PROGRAMS=symmetric_memory.PROGRAMS,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),  # as `_rms_norm`: the same order of a sum
            **registers,
            **EXACT,
        )
    return out.result
