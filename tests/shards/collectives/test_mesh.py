"""Real ranks over gloo: what is handed on is let go, and sums have one order."""

from __future__ import annotations

import weakref
from multiprocessing.queues import Queue

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from arriero.shards.collectives.divided_sum import divides_sum
from arriero.shards.collectives.mesh import MOST_SENDING
from support.ranks import joined, ranks, tell

STEPS = 60


def run_rank(rank: int, port: int, told: Queue[tuple[int, float]]) -> None:
    mesh = joined(rank, port, pp=2, timeout_s=30)
    if rank == 0:
        sent = []
        for step in range(STEPS):
            x_TH = torch.full((4, 32), float(step))
            sent.append(weakref.ref(x_TH))
            mesh.send_hidden(x_TH)
            del x_TH
        tell(told, (sum(one() is not None for one in sent), 0.0))
    else:
        x_TH = torch.empty(4, 32)
        total = 0.0
        for _ in range(STEPS):
            mesh.recv_hidden(x_TH)
            total += float(x_TH[0, 0])
        tell(told, (-1, total))
    dist.barrier()  # a rank that leaves with sends still on their way breaks them off


def test_activations_are_let_go_once_they_are_out() -> None:
    with ranks(2, run_rank) as told:
        heard = dict(told.get(timeout=90) for _ in range(2))
    assert heard.pop(-1) == sum(range(STEPS))
    (kept,) = heard
    assert kept <= MOST_SENDING


SHAPES = [(1, 64), (1, 200_000), (3, 64), (5, 40_000), (130, 1024), (131, 1024), (512, 1024)]
"""Rows and columns of sums, some large enough to be divided, some not a multiple of the ranks."""


def part_of(rank: int, shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def sum_rank(rank: int, port: int, told: Queue[tuple[int, list[bool]]], tp: int) -> None:
    mesh = joined(rank, port, tp=tp, timeout_s=30)
    equal = []
    for shape in SHAPES:
        total = part_of(0, shape)
        for other in range(1, tp):
            total = total + part_of(other, shape)
        sums = mesh.reduce(part_of(rank, shape))
        equal.append(sums.is_contiguous() and torch.equal(sums, total))
    tell(told, (rank, equal))
    dist.barrier()


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_sums_are_in_rank_order_bit_for_bit(tp: int) -> None:
    divided = [divides_sum(tp, rows, 4 * columns) for rows, columns in SHAPES]
    assert sum(divided) == (4 if tp > 2 else 0)
    with ranks(tp, sum_rank, tp) as told:
        heard = dict(told.get(timeout=90) for _ in range(tp))
    assert heard == {rank: [True] * len(SHAPES) for rank in range(tp)}
