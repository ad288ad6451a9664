"""Rows between ranks over real sockets: nothing lost, nothing moved, whatever the skew."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from arriero.shards.collectives.all_to_all import topology
from support.processes import context

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


def check_experts(mesh: Any, rank: int) -> None:  # noqa: ANN401
    """Rows of every rank through experts on all of them: what one rank with all would compute."""
    from arriero.kernels.layers import MoELayer
    from arriero.kernels.reference.backend import ReferenceOps
    from arriero.shards.collectives.expert_parallel import ExpertParallel
    from arriero.shards.layout.expert_placement import ExpertPlacement

    ops = ReferenceOps(torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    hidden, columns, experts = 16, 8, 8

    def matrix(rows: int, inner: int) -> Any:  # noqa: ANN401
        weight = torch.randn(rows, inner, generator=generator) / inner**0.5
        return ops.pack_linear([weight], None, torch.float32)

    gate_up = [matrix(2 * columns, hidden) for _ in range(experts)]
    down = [matrix(hidden, columns) for _ in range(experts)]
    shared = matrix(2 * columns, hidden), matrix(hidden, columns)
    routers = {
        "random": torch.randn(experts, hidden, generator=generator),
        # inputs are positive: the fifth expert is always the best
        "all to one": torch.arange(experts)[:, None].eq(5).float().expand(-1, hidden),
        "none to a rank": torch.randn(experts, hidden, generator=generator)
        * torch.arange(experts)[:, None].ge(2).float()
        - torch.arange(experts)[:, None].lt(2).float(),
    }
    twice = ExpertPlacement.even([2] * RANKS, spare=1)
    for placement in (ExpertPlacement.even([2] * RANKS), twice):
        run = ExpertParallel(mesh, ops, placement, "float32")
        for index, (kind, router) in enumerate(routers.items()):
            for tokens in (3 * rank, 0, 40):
                x = torch.rand(tokens, hidden, generator=torch.Generator().manual_seed(rank))

                def layer(held: list[int], router: Any = router, index: int = index) -> MoELayer:  # noqa: ANN401
                    empty = ops.pack_linear([torch.zeros(1, 1)], None, torch.float32)
                    return MoELayer(
                        attn_norm_H=torch.ones(1),
                        qkv=empty,
                        o=empty,
                        mlp_norm_H=torch.ones(hidden),
                        gate_up=shared[0],
                        down=shared[1],
                        num_q_heads=1,
                        num_kv_heads=1,
                        head_dim=1,
                        softmax_scale=1.0,
                        eps=1e-5,
                        router=ops.pack_linear([router], None, torch.float32),
                        experts_gate_up=[gate_up[one] for one in held],
                        experts_down=[down[one] for one in held],
                        first_expert=0,
                        top_k=2,
                        index=index,
                    )

                got = run(x, layer(placement.on(rank)))
                run.padded_tokens = 40
                in_blocks = run(x, layer(placement.on(rank)))
                run.padded_tokens = 0
                assert torch.equal(in_blocks, got), "blocks of a fixed size change no bit"
                expected = ops.moe_block(x, layer(list(range(experts))))
                assert got.shape == expected.shape
                assert torch.allclose(got, expected, atol=1e-5), (kind, tokens)
        loads = run.take_loads()
        total = 2 * 2 * sum(3 * one + 40 for one in range(RANKS))  # by counts, and in blocks
        assert [int(loads[one].sum()) for one in range(3)] == [total] * 3
        assert int(loads[1][5]) == total // 2 and not run.take_loads()


def rank_main(rank: int, port: int, hosts: list[str], results: Any) -> None:  # noqa: ANN401
    """Exchange and send back, and tell the parent what went wrong, if anything did."""
    from torch._C._distributed_c10d import TCPStore

    from arriero.shards.collectives.all_to_all import TwoLevelExchange
    from arriero.shards.collectives.mesh import Mesh
    from arriero.shards.config.parallel import ParallelConfig
    from arriero.shards.layout.moe import partition_moe
    from arriero.shards.models.llama4.config import Llama4Config
    from support.models import llama4_settings

    try:
        torch.set_num_threads(1)
        model = Llama4Config.from_dict(llama4_settings())
        parallel = ParallelConfig(dp=RANKS)
        part = partition_moe(model, parallel)[rank]
        mesh = Mesh(part, parallel, device=torch.device("cpu"), timeout_s=30)
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
        blocks = [[rank, to, i] * (HIDDEN // 3) for to in range(RANKS) for i in range(5)]
        swapped = mesh.exchange.swap(torch.tensor(blocks, dtype=torch.uint8))
        heads = [[a, rank, i] for a in range(RANKS) for i in range(5)]
        assert swapped[:, :3].tolist() == heads
        check_experts(mesh, rank)
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
