"""Rows between ranks over real sockets: nothing lost, nothing moved, whatever the skew."""

from __future__ import annotations

import multiprocessing
import random
from typing import Any

import numpy as np
import pytest
import torch

from arriero.shards.exchange import topology

RANKS, HIDDEN = 4, 24


def test_topology() -> None:
    assert topology(["a"] * 4) == 0
    assert topology(["a", "b", "c", "d"]) == 0
    assert topology(["a", "a", "b", "b"]) == 2
    assert topology(["a", "a", "a", "b", "b", "b"]) == 3
    assert topology(["a", "a", "b", "c"]) == 0
    assert topology(["a", "b", "a", "b"]) == 0
    assert topology(["a", "a", "b", "b", "a", "a"]) == 0


def spread(kind: str, rng: random.Random) -> np.ndarray:
    """Rows from each rank to each rank."""
    counts = np.zeros((RANKS, RANKS), dtype=np.int64)
    if kind == "all to one":
        counts[:, 2] = [5, 0, 17, 3]
    elif kind == "none to a rank":
        counts[:] = [[rng.randrange(9) for _ in range(RANKS)] for _ in range(RANKS)]
        counts[:, 1] = 0
    elif kind == "a rank has none":
        counts[:] = [[rng.randrange(9) for _ in range(RANKS)] for _ in range(RANKS)]
        counts[3] = 0
    elif kind == "random":
        counts[:] = [[rng.randrange(40) for _ in range(RANKS)] for _ in range(RANKS)]
    return counts


KINDS = ("nothing", "all to one", "none to a rank", "a rank has none", "random", "random", "random")


def rank_main(rank: int, port: int, hosts: list[str], results: Any) -> None:  # noqa: ANN401
    """Exchange and send back, and tell the parent what went wrong, if anything did."""
    from torch._C._distributed_c10d import TCPStore

    from arriero.shards.exchange import TwoLevelExchange
    from arriero.shards.mesh import Mesh
    from arriero.shards.models.llama4_config import Llama4Config
    from arriero.shards.partition_moe import MoEMesh, partition_moe
    from support.models import llama4_settings

    try:
        torch.set_num_threads(1)
        model = Llama4Config.from_dict(llama4_settings())
        part = partition_moe(model, MoEMesh(dp=RANKS))[rank]
        mesh = Mesh(part, tp=1, pp=1, dp=RANKS, device=torch.device("cpu"), timeout_s=30)
        store = TCPStore("127.0.0.1", port, RANKS, is_master=rank == 0, wait_for_workers=False)
        mesh.join(store, hosts[rank])
        two_levels = len(set(hosts)) > 1
        assert isinstance(mesh.exchange, TwoLevelExchange) == two_levels
        rng = random.Random(7)  # the same on every rank
        for kind in KINDS:
            counts = spread(kind, rng)
            # a row says whence it comes, where it goes, and which it is
            sent = [
                [rank, to, i, *((rank * 31 + to * 7 + i + j) % 251 for j in range(HIDDEN - 3))]
                for to in range(RANKS)
                for i in range(counts[rank, to])
            ]
            rows = torch.tensor(sent, dtype=torch.uint8).view(-1, HIDDEN)
            got = mesh.exchange.begin(rows, counts)()
            heads = [[a, rank, i] for a in range(RANKS) for i in range(counts[a, rank])]
            assert got[:, :3].tolist() == heads, kind
            back = mesh.exchange.begin(got, counts.T.copy())()
            assert torch.equal(back, rows), kind
        results.put((rank, None))
        mesh.leave()
    except BaseException as error:
        results.put((rank, repr(error)))
        raise


@pytest.mark.parametrize("nodes", [1, 2])
def test_there_and_back(nodes: int) -> None:
    """In one level on one machine, in two on two (two loopback addresses)."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [f"127.0.0.{2 + rank * nodes // RANKS}" for rank in range(RANKS)]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(rank, port, hosts, results))
        for rank in range(RANKS)
    ]
    for one in ranks:
        one.start()
    try:
        told = dict(results.get(timeout=120) for _ in ranks)
    finally:
        for one in ranks:
            one.join(20)
            if one.is_alive():
                one.kill()
    assert told == dict.fromkeys(range(RANKS))
