"""Whether a group sums over symmetric memory: all ranks decide the same, and say why not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from arriero.shards.collectives import symmetric_sums
from arriero.shards.collectives.divided_sum import divides_sum
from arriero.shards.collectives.symmetric_sizes import divides_rows, in_symmetric_memory
from arriero.shards.collectives.symmetric_sums import Ranks, open_symmetric_sums

KERNELS: Any = object()
"""Kernels that no test calls."""


@dataclass(frozen=True)
class Rank:
    """What a rank brings to the decision.

    Attributes:
        host: its machine.
        gpu: number of its GPU.
        kernels: its backend's kernels.
        error: of the rendezvous on this rank.
        broken: why its kernels do not compile.
        differs: what its rehearsal finds.
    """

    host: str = "10.0.0.1"
    gpu: int = 0
    kernels: Any = KERNELS
    error: str = ""
    broken: str = ""
    differs: str = ""


USUAL = (Rank(), Rank(gpu=1))


class Sums:
    """Sums after a rendezvous."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def compile(self, device: torch.device) -> None:
        if self.rank.broken:
            raise ValueError(self.rank.broken)

    def rehearse(self, device: torch.device, reference: Callable[[Tensor], Tensor]) -> str:
        return self.rank.differs


def decided(monkeypatch: pytest.MonkeyPatch, group: tuple[Rank, ...]) -> list[object]:
    """What each rank gets."""
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=132, uuid=f"GPU-{device.index}"),
    )

    def share(ranks: Ranks, kernels: object) -> object:
        error = group[ranks.rank].error
        if error:
            raise RuntimeError(error)
        return Sums(group[ranks.rank])

    monkeypatch.setattr(symmetric_sums, "_share_memory", share)
    store = HashStore()

    def run(number: int) -> object:
        rank = group[number]
        ranks = Ranks(
            rank=number,
            size=len(group),
            name="0",
            store=store,
            group=None,  # type: ignore[arg-type]  # the rendezvous is replaced
            host=rank.host,
            device=torch.device("cuda", rank.gpu),
        )
        return open_symmetric_sums(ranks, rank.kernels, torch.clone)

    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(run, range(len(group))))


def test_ranks_of_a_machine_use_symmetric_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="arriero")
    assert all(isinstance(sums, Sums) for sums in decided(monkeypatch, USUAL))
    assert caplog.messages == ["sums of 2 tensor-parallel ranks: symmetric memory"]


@pytest.mark.parametrize(
    ("group", "why"),
    [
        ((Rank(), Rank(gpu=1, host="10.0.0.2")), "the ranks are on several machines"),
        ((Rank(), Rank()), "several ranks have the same GPU"),
        (
            (Rank(), Rank(gpu=1, kernels=None)),
            "rank 1: the backend of the kernels has no such sums",
        ),
        ((Rank(), Rank(gpu=1, error="no P2P")), "rank 1: RuntimeError: no P2P"),
        ((Rank(broken="no ptxas"), Rank(gpu=1)), "rank 0: ValueError: no ptxas"),
        ((Rank(differs="1 differs"), Rank(gpu=1)), "rank 0: 1 differs"),
        (tuple(Rank(gpu=gpu) for gpu in range(17)), "rank 0: 17 ranks; at most 16 have signals"),
    ],
)
def test_a_reason_of_one_rank_holds_for_all(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    group: tuple[Rank, ...],
    why: str,
) -> None:
    caplog.set_level(logging.INFO, logger="arriero")
    assert decided(monkeypatch, group) == [None] * len(group)
    assert caplog.messages == [f"sums of {len(group)} tensor-parallel ranks: NCCL ({why})"]


def test_the_switch_turns_it_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="arriero")
    monkeypatch.setenv(symmetric_sums.SWITCH, "0")
    assert decided(monkeypatch, USUAL) == [None, None]
    assert "NCCL (rank 0: ARRIERO_SYMMETRIC_MEMORY=0)" in caplog.messages[0]


def test_large_sums_are_divided_and_the_largest_stay_with_nccl() -> None:
    row = 2 * 16384  # of the 405B in bfloat16
    assert [divides_rows(8, rows, row) for rows in (1, 6, 7, 64)] == [False, False, True, True]
    assert not divides_rows(2, 512, row), "two ranks would receive as much"
    assert in_symmetric_memory(512, row) and not in_symmetric_memory(513, row)
    assert divides_sum(8, 513, row), "by two exchanges"
