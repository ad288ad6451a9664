"""Rate at which a slice copies KV blocks out of another group's memory, against memcpy.

    python tests/bench/peer_rate.py --megabytes 64

Two pools of one process stand for two slices: the copy goes through the shared memory's file as
it does between processes, checks of keys included. Prints a JSON line: GB/s of plain copies, of
whole blocks, and of blocks that are put together from two slices' halves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch

from arriero.shards.kv.host import HostPool, PeerPool
from arriero.shards.kv.pieces import BlockForm, Piece


def rate(work: Callable[[], object], nbytes: int, repeats: int = 9) -> float:
    """The best of some runs, in GB/s."""
    best = 1e9
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return round(nbytes / best / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    form = BlockForm(torch.bfloat16, 16, 128)
    whole = Piece((0, 32), (0, 8))  # of Llama 3.1 8B: 2 MiB a block
    count = (args.megabytes << 20) // form.nbytes(whole)
    keys = [os.urandom(16) for _ in range(count)]
    slots = range(count)
    pools = []
    for pieces in ([whole], [Piece((0, 32), (0, 4)), Piece((0, 32), (4, 8))]):
        made = []
        for piece in pieces:
            pool = HostPool(form, piece, count, pinned=False)
            pool.begin(list(slots))
            pool.data.normal_()
            pool.end(list(slots), keys)
            made.append(pool)
        pools.append(made)
    into = torch.empty((count, *form.shape(whole)), dtype=form.dtype)
    source = torch.empty_like(into).normal_()
    nbytes = count * form.nbytes(whole)
    found = {"megabytes": args.megabytes, "memcpy_gb_s": rate(lambda: into.copy_(source), nbytes)}
    for name, made in zip(("whole", "two_halves"), pools, strict=True):
        peer = PeerPool([one.segment for one in made], form, whole)

        def pull(peer: PeerPool = peer) -> None:
            for slot, key in enumerate(keys):
                peer.get(key, slot, into[slot])

        found[f"{name}_gb_s"] = rate(pull, nbytes)
        found[f"{name}_share"] = round(found[f"{name}_gb_s"] / found["memcpy_gb_s"], 2)
        peer.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
