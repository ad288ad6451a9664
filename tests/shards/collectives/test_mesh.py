"""Real ranks over gloo: what is handed on is let go."""

from __future__ import annotations

import weakref
from multiprocessing.queues import Queue

import torch
import torch.distributed as dist

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
