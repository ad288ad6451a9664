"""Steps in halves: which steps, and that all ranks agree on the second stream."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.distributed import HashStore

from arriero.shards.collectives.beside import SWITCH, Beside
from arriero.shards.collectives.half_steps import (
    LEAST_ROUTED_ROWS,
    LEAST_ROWS,
    ROWS_MULTIPLE,
    first_half,
)
from arriero.shards.collectives.symmetric_sizes import BUFFER_NBYTES
from support.fake_cuda import simulated

CUDA = torch.device("cuda")
ROW_405B = 16384 * 2


def test_steps_with_many_rows_and_bytes_go_in_halves() -> None:
    first = partial(first_half, routed=False)
    assert first(8, 8192, ROW_405B) == 4096
    assert first(8, LEAST_ROWS, ROW_405B) == LEAST_ROWS // 2
    assert first(8, LEAST_ROWS - 1, ROW_405B) == 0, "half would read weights for too few rows"
    assert first(8, BUFFER_NBYTES // 8192, 8192) == 0, "symmetric memory has room for the sum"
    assert first(8, BUFFER_NBYTES // 8192 + 1, 8192) == 1024
    assert first(1, 8192, ROW_405B) == 0, "a rank alone sums nothing"
    for rows in range(LEAST_ROWS, 3 * LEAST_ROWS, 37):
        half = first(2, rows, ROW_405B)
        assert half % ROWS_MULTIPLE == 0 and 0 < half <= rows - half < half + 2 * ROWS_MULTIPLE


def test_steps_with_routed_experts_need_more_rows() -> None:
    """Each half reads most experts."""
    for rows, half in ((LEAST_ROUTED_ROWS - 1, 0), (LEAST_ROUTED_ROWS, LEAST_ROUTED_ROWS // 2)):
        assert first_half(8, rows, ROW_405B, routed=True) == half


def test_a_cpu_runs_the_work_at_once() -> None:
    beside = Beside(torch.device("cpu"))
    beside.open(HashStore(), 0, 2)
    queued: list[int] = []
    pending = beside.begin(lambda: queued.append(1))
    assert not beside.on and queued == [1]
    pending.wait()
    with pytest.raises(AssertionError, match="once"):
        pending.wait()


@pytest.mark.parametrize("words", [("1", "1"), ("1", "0")])
def test_all_ranks_agree(
    words: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One rank's switch turns the second stream off everywhere: halves are collective."""
    caplog.set_level(logging.INFO, logger="arriero")
    store = HashStore()
    ranks = [Beside(CUDA), Beside(CUDA)]
    with simulated(), ThreadPoolExecutor(2) as pool:
        monkeypatch.setenv(SWITCH, words[1])
        other = pool.submit(ranks[1].open, store, 1, 2)
        store.get("overlap/1")  # the other rank has read its switch
        monkeypatch.setenv(SWITCH, words[0])
        ranks[0].open(store, 0, 2)
        other.result()
    on = words[1] == "1"
    assert [rank.on for rank in ranks] == [on, on]
    expected = "on" if on else f"off (rank 1: {SWITCH}=0)"
    assert caplog.messages == [f"collectives beside products: {expected}"]
