"""Sums over memory of ranks, by ranks that are processes over the same memory, at their own pace.

Kernels are interpreted. A rank sleeps for random times between its accesses, so that ranks come to
a sum in any order and read late; the next sums overwrite what a rank has not read, unless the
kernel prevents it.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime import interpreter

from arriero.kernels import symmetric_memory
from arriero.kernels.rounded_rows import InputRows, Rounding, unrounded
from arriero.kernels.symmetric_memory import SymmetricMemory, block_nbytes, holds
from arriero.kernels.triton import norm, symmetric_sums
from arriero.shards.collectives.mesh import added

PROGRAMS = 3
"""Programs of a sum, fewer than rows, so that a program has several rows."""
BUFFER_NBYTES = 1 << 14
EPS = 1e-5
FLOAT32, FLOAT16 = torch.float32, torch.float16
Sum = tuple[int, int, torch.dtype, bool, bool | Rounding]
"""Rows, columns, dtype, whether the rows are divided, whether the norm follows, and is rounded."""
ROUNDINGS = (
    Rounding(),
    Rounding(bound=2.0, keeps_rows=True),
    Rounding(scale=torch.tensor([0.01])),
)


def operands(step: int, ranks: int, shape: Sum) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of all ranks, whose sums depend on their order; the residual; the norm's weights."""
    rows, columns, dtype, _, _ = shape
    generator = torch.Generator().manual_seed(step)
    parts = torch.randn(ranks, rows, columns, generator=generator)
    parts *= torch.logspace(-2, 2, ranks)[:, None, None]
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    return parts.to(dtype), x, torch.randn(columns, generator=generator)


def wrong_sums(memory: SymmetricMemory, sums: list[Sum]) -> list[int]:
    """Takes part in sums one after another; those whose bits are not the separate kernels'."""
    wrong = []
    for step, shape in enumerate(sums):
        parts, x, weight = operands(step, memory.size, shape)
        own, total = parts[memory.rank].clone(), added(parts.clone())
        divides, norms = shape[3:]
        if norms:
            rounding = norms if isinstance(norms, Rounding) else None
            kept, expected_x = x.clone(), x.clone()
            out = symmetric_sums.add_rms_norm(
                memory, own, kept, weight, EPS, divides=divides, rounding=rounding
            )
            expected = norm.norm_rows(expected_x, total, weight, EPS, rounding)
            same = torch.equal(kept, expected_x) and same_rows(out, expected)
        else:
            same = torch.equal(symmetric_sums.reduce(memory, own, divides=divides), total)
        if not same:
            wrong.append(step)
    return wrong


def same_rows(rows: InputRows, expected: InputRows) -> bool:
    """Whether all that is there has the same bits: rows, levels, scales."""
    if isinstance(rows, Tensor) or isinstance(expected, Tensor):
        return torch.equal(unrounded(rows), unrounded(expected))
    pairs = [
        (rows.levels_TI.view(torch.uint8), expected.levels_TI.view(torch.uint8)),
        (rows.scale_T1, expected.scale_T1),
    ]
    if rows.rows_TI is not None or expected.rows_TI is not None:
        pairs.append((unrounded(rows), unrounded(expected)))
    return all(torch.equal(*pair) for pair in pairs)


Pause = Callable[[int, random.Random], float]
"""Seconds of sleep of a rank after an access to a signal."""


def slow(rank: int, pause: Pause) -> AbstractContextManager[object]:
    """Triton's interpreter, with a rank that sleeps after it has told or read signals."""
    real, chance = interpreter.InterpreterBuilder.create_atomic_rmw, random.Random(rank)

    def create(builder: object, *arguments: object) -> object:
        result = real(builder, *arguments)
        time.sleep(pause(rank, chance))
        return result

    return mock.patch.object(interpreter.InterpreterBuilder, "create_atomic_rmw", create)


def memory_of(rank: int, blocks: list[Tensor]) -> SymmetricMemory:
    return SymmetricMemory(
        address_N=torch.tensor([block.data_ptr() for block in blocks]),
        epoch_P=torch.zeros(PROGRAMS, dtype=torch.int64),
        rank=rank,
        size=len(blocks),
        buffer_nbytes=BUFFER_NBYTES,
    )


def run_ranks(ranks: int, sums: list[Sum], pause: Pause) -> list[list[int]]:
    """The wrong sums of each rank. Ranks are forked: their memory lies at the same addresses."""
    context = multiprocessing.get_context("fork")
    heard = context.SimpleQueue()
    blocks = [
        torch.zeros(block_nbytes(BUFFER_NBYTES), dtype=torch.uint8).share_memory_()
        for _ in range(ranks)
    ]

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        with slow(rank, pause):
            heard.put((rank, wrong_sums(memory_of(rank, blocks), sums)))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * ranks
        return [wrong for _, wrong in sorted(heard.get() for _ in processes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def any_pace(rank: int, chance: random.Random) -> float:
    return chance.choice((0, 0, 0.001, 0.004))


def use_programs(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(symmetric_memory, "PROGRAMS", count)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_programs(monkeypatch, PROGRAMS)


@pytest.mark.parametrize("ranks", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_sums_have_the_bits_of_the_separate_kernels(ranks: int) -> None:
    chance = random.Random(ranks)
    sums = [
        (chance.choice((1, 2, 4, 7)), chance.choice((8, 33, 64)), dtype, divides, norms)
        for dtype in (FLOAT32, FLOAT16)
        for divides in (False, True)
        for norms in (False, True, chance.choice(ROUNDINGS))
    ]
    chance.shuffle(sums)
    assert run_ranks(ranks, sums, any_pace) == [[]] * ranks


def first_reads_late(rank: int, chance: random.Random) -> float:
    return 0.05 if rank == 0 else 0.0


@pytest.mark.parametrize("divides", [False, True])
def test_a_rank_that_reads_late_reads_what_was_summed(
    monkeypatch: pytest.MonkeyPatch, divides: bool
) -> None:
    use_programs(monkeypatch, 1)  # the interpreter runs programs one after another
    sums: list[Sum] = [(2, 16, FLOAT32, divides, False)] * 4
    assert run_ranks(2, sums, first_reads_late) == [[], []]
    monkeypatch.setattr(symmetric_memory, "BUFFERS", 1)
    wrong = run_ranks(2, sums, first_reads_late)
    assert wrong != [[], []], "with a single buffer the next sum overwrites what was not read"


def test_another_order_has_other_bits() -> None:
    parts, _, _ = operands(0, 4, (5, 64, FLOAT16, False, False))
    assert not torch.equal(added(parts.clone()), added(parts.flip(0)))


def test_a_limited_wait_ends_without_the_other_rank() -> None:
    blocks = [torch.zeros(block_nbytes(BUFFER_NBYTES), dtype=torch.uint8) for _ in range(2)]
    memory = memory_of(0, blocks)
    total = symmetric_sums.reduce(memory, torch.ones(4, 8), divides=True, most_polls=3)
    assert torch.equal(total[0], torch.ones(8)), "the other rank's part is not there"
    assert memory.epoch_P.tolist() == [2] * PROGRAMS


def test_a_buffer_holds_whole_rows_in_each_region() -> None:
    region = BUFFER_NBYTES // PROGRAMS
    assert holds(BUFFER_NBYTES, PROGRAMS, region // 16 * 16)
    assert not holds(BUFFER_NBYTES, PROGRAMS + 1, region // 16 * 16)
    assert holds(BUFFER_NBYTES, 0, 1 << 20)
