"""Sums over symmetric memory on all GPUs of the machine: NCCL's bits, and the time of both.

A process for each GPU, each of which sees its own GPU alone, as in a group of slices. A machine
with a single GPU skips this; a dry run has a rank whose partner has given every signal already.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import Queue
from types import SimpleNamespace
from typing import Any

import torch
from gpu import benches
from gpu.benches import Machine, Result
from gpu.checks import Where

from arriero.kernels.symmetric_memory import (
    PROGRAMS,
    SIGNALS_NBYTES,
    SymmetricMemory,
    block_nbytes,
)
from arriero.kernels.triton import norm, symmetric_sums
from arriero.kernels.triton.backend import TritonOps

ROWS = (1, 4, 16, 64, 256, 512)
HIDDEN, EPS = 16384, 1e-5
LIMIT_S = 100.0


class Skipped(Exception):
    """Why this machine cannot run an item."""


def same_bits(at: Where) -> float:
    """The share of sums, norms and replays whose bits are not those of NCCL and separate kernels.

    Raises:
        Skipped: the machine has a single GPU.
    """
    if at.tiny:
        return _with_an_absent_partner(at)
    results = _on_all_gpus("bits")
    return sum(result["wrong"] for result in results) / sum(result["count"] for result in results)


def times(at: Where, machine: Machine) -> Result:
    """Microseconds of a captured sum, by NCCL and over symmetric memory, with and without the norm.

    Raises:
        Skipped: the machine has a single GPU.
    """
    if at.tiny:
        return {"1 rows": {"wrong": _with_an_absent_partner(at)}}
    by_rows: Result = _on_all_gpus("times")[0]
    return by_rows


def _on_all_gpus(work: str) -> list[Result]:
    """The results of all ranks, by rank."""
    size = min(8, torch.cuda.device_count())
    if size < 2:
        raise Skipped(f"{size} GPU here; sums over ranks need two or more")
    context = get_context("spawn")
    results: Queue[tuple[int, Result]] = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(rank, size, port, results, work))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        by_rank = dict(results.get(timeout=LIMIT_S) for _ in processes)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    errors = [result["error"] for result in by_rank.values() if "error" in result]
    if errors:
        raise RuntimeError(errors[0])
    return [by_rank[rank] for rank in range(size)]


def _rank(rank: int, size: int, port: int, results: Queue[Any], work: str) -> None:
    from arriero.shards.leader.visible_gpus import device_of

    os.environ["CUDA_VISIBLE_DEVICES"] = device_of(rank)
    try:
        result = _joined(rank, size, port, {"bits": _bits, "times": _times}[work])
    except Exception as error:  # the other ranks and the report wait for a result
        result = {"error": f"rank {rank}: {type(error).__name__}: {error}"}
    results.put((rank, result))


def _joined(rank: int, size: int, port: int, work: Callable[[Where, Any], Result]) -> Result:
    from torch.distributed import TCPStore

    from arriero.shards.collectives.mesh import Mesh
    from arriero.shards.config.parallel import ParallelConfig

    torch.set_grad_enabled(False)
    part: Any = SimpleNamespace(rank=rank, tp_rank=rank, first_stage=True, last_stage=True)
    mesh = Mesh(part, ParallelConfig(tp=size), device=torch.device("cuda"), timeout_s=LIMIT_S)
    mesh.use(TritonOps(torch.device("cuda"), batch_independent=False))
    store = TCPStore("127.0.0.1", port, size, is_master=rank == 0, wait_for_workers=False)
    mesh.join(store, "127.0.0.1")
    if mesh._symmetric is None:
        raise RuntimeError("the group sums by NCCL; the log has the reason")
    mesh.watchdog.marking = False
    try:
        return work(Where(torch.device("cuda"), torch.bfloat16, tiny=False), mesh)
    finally:
        torch.distributed.barrier()
        mesh.leave()


def _bits(at: Where, mesh: Any) -> Result:  # noqa: ANN401
    """Eager sums and norms, and three replays of a captured sum."""
    sums, wrong, count = mesh._symmetric, 0, 0
    weight = torch.linspace(0.5, 1.5, HIDDEN, device=at.device)
    torch.manual_seed(mesh.part.rank)
    for rows in ROWS:
        part = at.randn(rows, HIDDEN)
        graph, captured = torch.cuda.CUDAGraph(), part.clone()
        with torch.cuda.graph(graph):
            total = sums.reduce(captured)
        for _ in range(3):
            part = at.randn(rows, HIDDEN)
            mesh._symmetric = None
            expected = mesh.reduce(part.clone())
            mesh._symmetric = sums
            x = torch.ones_like(part)
            expected_x = x.clone()
            expected_h = norm.add_rms_norm(expected_x, expected, weight, EPS)
            h = mesh.reduce_norm(part, x, weight, EPS)
            captured.copy_(part)
            graph.replay()
            pairs = (
                (mesh.reduce(part.clone()), expected),
                (h, expected_h),
                (x, expected_x),
                (total, expected),
            )
            wrong += sum(not torch.equal(actual, wanted) for actual, wanted in pairs)
            count += len(pairs)
    return {"wrong": wrong, "count": count}


def _times(at: Where, mesh: Any) -> Result:  # noqa: ANN401
    sums, out = mesh._symmetric, Result()
    weight = torch.ones(HIDDEN, device=at.device)
    for rows in ROWS:
        part, x = at.randn(rows, HIDDEN), at.randn(rows, HIDDEN)

        def by_nccl(part: torch.Tensor = part, x: torch.Tensor = x) -> None:
            norm.add_rms_norm(x, mesh.reduce(part), weight, EPS)

        mesh._symmetric = None
        nccl_s = benches.seconds(at, by_nccl)
        mesh._symmetric = sums
        alone_s = benches.seconds(at, lambda part=part: mesh.reduce(part))
        normed_s = benches.seconds(
            at, lambda part=part, x=x: mesh.reduce_norm(part, x, weight, EPS)
        )
        out[f"{rows} rows"] = {
            "nccl_and_norm_us": nccl_s * 1e6,
            "symmetric_us": alone_s * 1e6,
            "symmetric_with_norm_us": normed_s * 1e6,
        }
    return out


def _with_an_absent_partner(at: Where) -> float:
    """Rank 0 of two, whose partner has a part of zeros: the sum is the part."""
    nbytes = 1 << 14
    blocks = [
        torch.zeros(block_nbytes(nbytes), dtype=torch.uint8, device=at.device) for _ in range(2)
    ]
    blocks[0][:SIGNALS_NBYTES].view(torch.int64).fill_(1 << 40)
    memory = SymmetricMemory(
        address_N=torch.tensor([block.data_ptr() for block in blocks]).to(at.device),
        epoch_P=torch.zeros(PROGRAMS, dtype=torch.int64, device=at.device),
        rank=0,
        size=2,
        buffer_nbytes=nbytes,
    )
    part = at.randn(1, 16)
    return float(not torch.equal(symmetric_sums.reduce(memory, part, divides=False), part))


SAME: dict[str, Callable[[Where], float]] = {"sums over symmetric memory": same_bits}
BENCHES: dict[str, Callable[[Where, Machine], Result]] = {"sums over ranks": times}
