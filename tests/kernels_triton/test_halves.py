"""A step in two halves: the bits of the whole step, and sums with other products beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from support import triton_interpreter

triton_interpreter.install()
pytest.importorskip("triton")

from kernels import paged  # noqa: E402
from kernels.test_blocks import CASE, HIDDEN, pack, weights  # noqa: E402

from arriero.kernels.halves import halved  # noqa: E402
from arriero.kernels.triton import triton_ops  # noqa: E402

CPU = torch.device("cpu")
ROWS = sum(new for _, new in CASE.sequences)


@dataclass
class Sums:
    """Sums over two slices with the same weights; notes when each begins and when it is read."""

    cut: int = 0
    log: list[tuple[str, int]] = field(default_factory=list)

    def reduce(self, part_TH: Tensor) -> Tensor:
        return part_TH * 2

    def first_half(self, num_rows: int, row_nbytes: int, *, routed: bool) -> int:
        assert (num_rows, row_nbytes, routed) == (ROWS, HIDDEN * 4, False)
        return self.cut

    def begin_reduce(self, part_TH: Tensor) -> Pending:
        self.log.append(("begin", len(part_TH)))
        return Pending(self, part_TH)


@dataclass
class Pending:
    """The sum is taken late, as a second stream may: the part must still be the same by then."""

    sums: Sums
    part_TH: Tensor

    def wait(self) -> Tensor:
        self.sums.log.append(("wait", len(self.part_TH)))
        return self.sums.reduce(self.part_TH)


@lru_cache(maxsize=1)
def outcome_of_whole() -> tuple[Tensor, list[Tensor]]:
    sums = Sums()
    result = outcome(sums)
    assert not sums.log, "a whole step begins no sum beside"
    return result


def outcome(sums: Sums) -> tuple[Tensor, list[Tensor]]:
    """The rows after two layers, and what enters the second layer and leaves it."""
    ops = triton_ops(CPU)
    layers = [pack(ops, weights(torch.float32, seed), torch.float32) for seed in range(2)]
    spec = paged.spec(CASE, torch.float32)
    batch = paged.batch(CASE.sequences, paged.tables(CASE, spec.num_blocks), CASE.head_dim)
    x = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(5))
    tapped: list[Tensor] = []

    def tap(x_TH: Tensor) -> None:
        tapped.append(x_TH.clone())

    run = ops.decoder(
        layers,
        paged.poisoned_cache(ops, spec),
        sums.reduce,
        taps={1: tap, 2: tap},
        half_sums=sums,
    )
    return run(x, batch), tapped


@pytest.mark.parametrize("cut", [4, 8, 9, 12])
def test_halves_give_the_bits_of_the_whole(cut: int) -> None:
    """Cut in a sequence, before its last token, after it, and behind a sequence of one token."""
    whole, taps_of_whole = outcome_of_whole()
    sums = Sums(cut)
    halves, taps = outcome(sums)
    assert torch.equal(halves, whole)
    assert len(taps) == 2 and all(map(torch.equal, taps, taps_of_whole))
    assert [name for name, _ in sums.log].count("begin") == 2 * 2 * 2
    first, second = cut, ROWS - cut
    beside = [("begin", first), ("begin", second), ("wait", first)]
    assert sums.log[:3] == beside, "the second half's attention runs beside the first half's sum"
    assert sums.log[3:6] == [("begin", first), ("wait", second), ("begin", second)]
    assert sums.log[-2:] == [("wait", first), ("wait", second)]


def test_the_rows_of_two_halves() -> None:
    """Sequences of 9, 1 and 14 new tokens; the last one has six in the first half."""
    sequences = [(3, 9), (0, 1), (8, 14)]
    batch = paged.batch(sequences, [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9]], 8)
    first, second = halved(batch, 16)
    assert first.query_start_S1.tolist() == [0, 9, 10, 16]
    assert second.query_start_S1.tolist() == [0, 0, 0, 8]
    assert first.context_S.tolist() == [12, 1, 14]
    assert second.context_S.tolist() == [12, 1, 22]
    assert (first.max_query, second.max_query) == (14, 8)
    for name in ("positions_T", "slots_T", "cos_TD", "sin_TD"):
        parts = getattr(first, name), getattr(second, name)
        assert len(parts[0]) == 16 and torch.equal(torch.cat(parts), getattr(batch, name))
    assert first.query_start_S1.dtype == first.context_S.dtype == torch.int32
