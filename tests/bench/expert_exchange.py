"""Bytes moved and time of the exchange for experts, against a dense all-gather.

    PYTHONPATH=src:tests python tests/bench/expert_exchange.py --ranks 4 --hidden 1024

Dispatch and combine move each row to the rank of its expert and back. The alternative gathers every
rank's tokens on every rank, computes the experts held there, and sums the partial outputs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

TURNS = 30


def rank_main(rank: int, ranks: int, hidden: int, port: int, results: Any) -> None:  # noqa: ANN401
    """Measure on one rank; rank 0 tells."""
    from torch._C._distributed_c10d import TCPStore

    from arriero.kernels.expert_rows import RowFormat, pack
    from arriero.shards.collectives.all_to_all import DirectExchange

    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, ranks, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    exchange = DirectExchange(rank, group)
    wires: tuple[RowFormat, ...] = ("float32", "bfloat16", "fp8")
    for tokens in (1, 32, 512):
        rng = np.random.default_rng(tokens)
        counts = rng.multinomial(tokens, np.full(ranks, 1 / ranks), size=ranks).astype(np.int64)
        x_TH = torch.randn(tokens, hidden)
        rows: list[tuple[str, float, float]] = []
        for wire in wires:
            back: RowFormat = "bfloat16" if wire == "fp8" else wire
            sent = pack(x_TH, wire).nbytes * (ranks - 1) / ranks
            sent += pack(x_TH, back).nbytes * (ranks - 1) / ranks

            def turn(
                wire: RowFormat = wire,
                back: RowFormat = back,
                counts: Any = counts,  # noqa: ANN401
                x_TH: torch.Tensor = x_TH,
            ) -> None:
                got = exchange.begin(pack(x_TH, wire), counts)()
                answer = torch.empty(len(got), hidden)
                exchange.begin(pack(answer, back), counts.T.copy())()

            rows.append((f"all-to-all, {wire}", sent, _mean_s(turn)))
        whole = torch.empty(ranks * tokens, hidden)

        def dense(whole: torch.Tensor = whole, x_TH: torch.Tensor = x_TH) -> None:
            dist.all_gather_into_tensor(whole, x_TH)
            dist.all_reduce(whole)

        # each rank's rows go to all others; a ring all-reduce moves 2 (R - 1) / R of the whole
        moved = x_TH.nbytes * (ranks - 1) + 2 * whole.nbytes * (ranks - 1) / ranks
        rows.append(("all-gather and all-reduce, float32", moved, _mean_s(dense)))
        if rank == 0:
            results.put((tokens, rows))
    dist.destroy_process_group()


def _mean_s(turn: Any) -> float:  # noqa: ANN401
    turn()
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(TURNS):
        turn()
    return (time.perf_counter() - begun) / TURNS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    asked = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(r, asked.ranks, asked.hidden, port, results))
        for r in range(asked.ranks)
    ]
    for one in ranks:
        one.start()
    print(f"{asked.ranks} ranks, hidden {asked.hidden}, top-1, evenly routed; a rank and layer:")
    for _ in range(3):
        tokens, rows = results.get(timeout=300)
        for name, moved, took in rows:
            print(f"{tokens:5} tokens a rank  {name:36} {moved / 1e3:9.1f} kB {took * 1e3:7.2f} ms")
    for one in ranks:
        one.join()


if __name__ == "__main__":
    main()
