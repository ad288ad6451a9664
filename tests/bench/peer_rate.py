"""Rates at which a slice copies KV blocks out of another group's memory.

    python tests/bench/peer_rate.py --megabytes 64

The other slice is a process of its own. Prints a JSON line, in GB/s: plain copies; blocks out of
shared memory, whole and put together from two ranks' halves; blocks through NIXL, if it is
installed; blocks over TCP on the loopback, beside `torch.distributed`'s (gloo) plain send and
receive of as many bytes in the same run. All blocks' checksums are compared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from arriero.shards.kv.block_shards import BlockForm, BlockShard
from arriero.shards.kv.host import HostPool
from arriero.shards.kv.nixl import NixlReader, NixlServer, enabled
from arriero.shards.kv.peer import PeerPool
from arriero.shards.kv.tcp import BlockServer


def rate(work: Callable[[], object], nbytes: int, repeats: int = 9) -> float:
    """The best of some runs, in GB/s."""
    best = 1e9
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return round(nbytes / best / 1e9, 2)


FORM = BlockForm(torch.bfloat16, 16, 128)
WHOLE = BlockShard((0, 32), (0, 8))  # of Llama 3.1 8B: 2 MiB a block
HALVES = (BlockShard((0, 32), (0, 4)), BlockShard((0, 32), (4, 8)))


def join(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def serve(pipe: Connection, keys: list[bytes], store: str) -> None:
    """The other slice: hold the blocks, tell where, and send when asked."""
    torch.set_num_threads(1)
    count, pools = len(keys), []
    for shard in (WHOLE, *HALVES):
        pool = HostPool(FORM, shard, count, pinned=False)
        data = torch.empty((count, *FORM.shape(shard)), dtype=FORM.dtype).normal_()
        pool.put(range(count), keys, data)
        pools.append(pool)
    server = BlockServer(pools[0], "127.0.0.1")
    readers = NixlServer(pools[0]) if enabled("nixl") else None
    endpoint = server.address, server.token, None if readers is None else readers.memory
    pipe.send([one.segment for one in pools] + [endpoint])
    join(1, store)
    while pipe.recv() == "send":
        dist.send(pools[0].data, 0)
    server.close()
    if readers is not None:
        readers.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    count = (args.megabytes << 20) // FORM.nbytes(WHOLE)
    keys = [os.urandom(16) for _ in range(count)]
    store = f"{tempfile.mkdtemp()}/store"
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=serve, args=(theirs, keys, store))
    child.start()
    whole, left, right, (address, token, nixl) = pipe.recv()
    join(0, store)
    into = torch.empty((count, *FORM.shape(WHOLE)), dtype=FORM.dtype)
    source = torch.empty_like(into).normal_()
    nbytes = count * FORM.nbytes(WHOLE)
    blocks = [(key, slot) for slot, key in enumerate(keys)]
    found = {"megabytes": args.megabytes, "memcpy": rate(lambda: into.copy_(source), nbytes)}
    away = replace(whole, host="elsewhere", address=address, token=token)
    ways = {"shared": [whole], "shared_halves": [left, right], "tcp": [away]}
    if nixl:
        ways["nixl"] = [replace(away, nixl=nixl)]
    for name, segments in ways.items():
        peer = PeerPool(segments, FORM, WHOLE, NixlReader() if name == "nixl" else None)

        def pull(peer: PeerPool = peer) -> None:
            for start in range(0, count, 8):  # as a mover's batches
                assert not peer.copy(blocks[start : start + 8], into[start : start + 8])

        found[name] = rate(pull, nbytes)
        peer.close()

    def receive() -> None:
        pipe.send("send")
        dist.recv(into, 1)

    found["gloo"] = rate(receive, nbytes)
    pipe.send("end")
    child.join()
    dist.destroy_process_group()
    found["shared_of_memcpy"] = round(found["shared"] / found["memcpy"], 2)
    if nixl:
        found["nixl_of_memcpy"] = round(found["nixl"] / found["memcpy"], 2)
    found["tcp_of_gloo"] = round(found["tcp"] / found["gloo"], 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
