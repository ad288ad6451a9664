"""The KV directory at size: memory, events a second and lookups, from a simulated feed.

    python tests/bench/directory.py --blocks 100_000_000 --groups 64

Prints one JSON line. Every group holds blocks of its own and a tenth of them are of a prefix that
all groups share; events come in batches of 1,000 from one group after the other.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from arriero.router.directory.directory import Directory
from arriero.router.directory.events import Batch, CacheChange, Snapshot
from arriero.router.directory.table import Keys

PIECE = 1_000_000


def made(start: int, count: int) -> Keys:
    """Keys as hashes are: SplitMix64 of a counter."""
    z = (np.arange(start, start + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1000)
    args = parser.parse_args()
    directory = Directory(1e9, args.blocks + args.blocks // 100)
    shared = args.blocks // 10
    own = (args.blocks - shared) // args.groups
    begun = time.perf_counter()
    numbers = [0] * args.groups
    for group in range(args.groups):
        directory.snapshot(f"g{group}", Snapshot(0), 0.0)
    for group in range(args.groups):
        spans = [(shared + group * own, own), (group * shared // args.groups, shared // 8)]
        for start, count in spans:
            for at in range(start, start + count, PIECE):
                piece = made(at, min(PIECE, start + count - at))
                kinds = np.full(len(piece), CacheChange.ON_DEVICE, dtype=np.uint8)
                numbers[group] += 1
                assert directory.apply(f"g{group}", Batch(numbers[group], kinds, piece), 0.0)
    fill_s = time.perf_counter() - begun

    rng = np.random.default_rng(0)
    batches = []
    for i in range(300):
        group = i % args.groups
        at = shared + group * own + int(rng.integers(0, own - args.batch))
        kinds = np.repeat(rng.integers(0, 4, args.batch // 50 + 1), 50)[: args.batch]
        batches.append((group, kinds.astype(np.uint8), made(at, args.batch)))
    begun = time.perf_counter()
    for group, kinds, changed in batches:
        numbers[group] += 1
        assert directory.apply(f"g{group}", Batch(numbers[group], kinds, changed), 0.0)
    events_s = time.perf_counter() - begun

    times = []
    for i in range(200):
        chain = made(shared + (i % args.groups) * own + 8192 * (i // args.groups), 8192)
        begun = time.perf_counter()
        found = directory.lookup(chain)
        times.append(time.perf_counter() - begun)
    assert found
    print(
        json.dumps(
            {
                "blocks": len(directory),
                "groups": args.groups,
                "table_gb": round(directory.nbytes / 1e9, 3),
                "bytes_a_block": round(directory.nbytes / len(directory), 1),
                "fill_s": round(fill_s, 1),
                "events_per_s": round(len(batches) * args.batch / events_s),
                "lookup_128k_tokens_p50_us": round(float(np.median(times)) * 1e6),
                "lookup_128k_tokens_p99_us": round(float(np.quantile(times, 0.99)) * 1e6),
            }
        )
    )


if __name__ == "__main__":
    main()
