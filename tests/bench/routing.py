"""Choices of a group compared on a trace, and hit rates against an ideal LRU: in virtual time.

    python tests/bench/routing.py --groups 4 --sessions 400

The groups' caches, the directory and the policy are the product's; only computing is modelled: a
group computes prompts one after the other at a fixed rate, slowed by what it decodes beside.
Prints a JSON line for each policy, and one for each cache size of a single group.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np

from arriero.router.backend import GroupLoad, GroupView
from arriero.router.directory import prefixes
from arriero.router.directory.directory import Directory, Reach
from arriero.router.directory.events import Batch, CacheChange, Snapshot
from arriero.router.directory.prefixes import NOTHING, CacheRoot
from arriero.router.directory.table import fingerprints
from arriero.router.routing.choose import order
from arriero.router.text.model_card import ModelCard
from arriero.shards.kv.blocks import BlockManager, CacheEvent, chain_keys, root_key
from arriero.shards.kv.limits import TierLimits
from arriero.shards.kv.pool_tiers import PoolOffloadManager
from arriero.shards.kv.transfers import Pool, Segment, TransferResult

from traces import Request, Shape, trace  # isort: skip

BLOCK = 16
ROOT = root_key(b"model")
PUBLISH_S = 0.05
TOKEN_S = 0.03
DECODE_SLOWS = 0.01
"""Each sequence that decodes beside takes so much of a group's time."""


@dataclass
class Cache:
    """A group's blocks: the device's pool, and host memory below it if `host_blocks`."""

    num_blocks: int
    host_blocks: int = 0
    listen: Callable[[CacheEvent, bytes], None] | None = None
    owners: Any = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        self.pool = BlockManager(self.num_blocks, BLOCK, on_event=self.listen)
        limits = TierLimits(host_blocks=self.host_blocks)
        self.tiers = PoolOffloadManager(
            limits, Pool.ALL, self.pool, lambda: next(self.owners), self.listen
        )
        if self.host_blocks:
            memory = Segment(0, 0, "", "", (0, 1), (0, 1), (BLOCK, 1, 1), self.host_blocks)
            self.tiers.apply(TransferResult(0, ready=True, segment=memory))

    def begin(self, keys: list[bytes], num_blocks: int) -> tuple[int, int, int]:
        """Give a request its blocks: (owner, blocks on the device, blocks that came up)."""
        near = up = len(self.pool.match(keys))
        if self.host_blocks:
            up = self.tiers.reach(keys, 0)
            load = self.tiers.load(keys[:up], 0, "")
            self._copy()
            self.tiers.end(load)
        owner, shared = next(self.owners), self.pool.match(keys)
        self.pool.allocate(owner, num_blocks, shared)
        return owner, near, up - near

    def computed(self, owner: int, keys: list[bytes], first: int) -> None:
        """Blocks of a request are whole from `first` on; `keys` are theirs."""
        self.pool.store(owner, first, keys)
        if self.host_blocks:
            self.tiers.note(keys, first, "")
            self._copy()

    def _copy(self) -> None:
        while batches := self.tiers.take_transfers():
            for batch in batches:
                self.tiers.apply(
                    TransferResult(0, done=[transfer.id for transfer in batch.transfers])
                )


@dataclass
class Group:
    """One group in virtual time."""

    name: str
    cache: Cache
    rate: float
    free_s: float = 0.0
    waiting: deque[tuple[float, int]] = field(default_factory=deque)
    decoding: dict[int, int] = field(default_factory=dict)
    events: list[tuple[CacheChange, bytes]] = field(default_factory=list)
    number: int = 0
    computed: int = 0

    def view(self, now_s: float, reach: Reach, card: ModelCard) -> GroupView:
        while self.waiting and self.waiting[0][0] <= now_s:
            self.waiting.popleft()
        prefill = sum(tokens for _, tokens in self.waiting)
        load = GroupLoad(
            outstanding_tokens=prefill + sum(self.decoding.values()), prefill_tokens=prefill
        )
        return GroupView(group_id=self.name, model="m", card=card, load=load, reach=reach)


Policy = Callable[[list[GroupView], Request, int], GroupView]


def round_robin(views: list[GroupView], request: Request, number: int) -> GroupView:
    return views[number % len(views)]


def least_loaded(views: list[GroupView], request: Request, number: int) -> GroupView:
    return min(views, key=lambda one: (one.load.outstanding_tokens, one.group_id))


def prefix_affinity(views: list[GroupView], request: Request, number: int) -> GroupView:
    return min(views, key=lambda v: (-v.reach.total, v.load.outstanding_tokens, v.group_id))


def first_token(views: list[GroupView], request: Request, number: int) -> GroupView:
    return order(views, num_prompt=len(request.prompt), num_tokens=len(request.prompt))[0]


POLICIES: dict[str, Policy] = {
    one.__name__: one for one in (round_robin, least_loaded, prefix_affinity, first_token)
}
CHANGES: dict[CacheEvent, CacheChange] = {
    "stored": CacheChange.ON_DEVICE,
    "evicted": CacheChange.OFF_DEVICE,
    "kept": CacheChange.OFFLOADED,
    "dropped": CacheChange.DROPPED,
}


def simulate(requests: list[Request], policy: Policy, args: argparse.Namespace) -> dict[str, float]:
    """Run a trace over groups."""
    card = ModelCard(
        model="m", group="g", layout="", digest="", max_model_len=1 << 20, vocab_size=1,
        bos_token_id=None, eos_token_ids=(), tokenizer_json=b"",
    )  # fmt: skip
    directory = Directory(lease_s=1e9)
    groups: dict[str, Group] = {}
    for i in range(args.groups):
        group = Group(f"g{i}", Cache(args.blocks, args.host_blocks), args.rate)

        def listen(event: CacheEvent, key: bytes, group: Group = group) -> None:
            group.events.append((CHANGES[event], key))

        group.cache = Cache(args.blocks, args.host_blocks, listen)
        groups[group.name] = group
        directory.snapshot(group.name, Snapshot(0), 0.0)
    ticks = count()
    due: list[tuple[float, int, Callable[[float], None]]] = []

    def after(at_s: float, act: Callable[[float], None]) -> None:
        heappush(due, (at_s, next(ticks), act))

    for number, request in enumerate(requests):
        after(request.at_s, lambda now, n=number, r=request: arrive(now, now, n, r))
    first_s: list[float] = []
    choose_s = 0.0
    hits = prompts = left = 0

    def arrive(now: float, came: float, number: int, request: Request) -> None:
        nonlocal choose_s, hits, prompts, left
        begun = time.perf_counter()
        reach = prefixes.find(directory, CacheRoot(ROOT, BLOCK), request.prompt)
        views = [one.view(now, reach.get(one.name, NOTHING), card) for one in groups.values()]
        group = groups[policy(views, request, number).group_id]
        choose_s += time.perf_counter() - begun
        keys = list(chain_keys(ROOT, request.prompt[:-1], BLOCK))
        total = -(-(len(request.prompt) + request.output) // BLOCK)
        pool = group.cache.pool
        if pool.cost(total, pool.match(keys)) > pool.num_available:
            after(now + 0.05, lambda at: arrive(at, came, number, request))
            return
        left += 1
        owner, near, up = group.cache.begin(keys, total)
        have = near + up
        missing = len(request.prompt) - have * BLOCK
        hits += have * BLOCK
        prompts += len(request.prompt)
        group.computed += missing
        work_s = (missing + 0.05 * up * BLOCK) / group.rate
        work_s *= 1 + DECODE_SLOWS * len(group.decoding)
        group.free_s = max(group.free_s, now) + work_s
        group.waiting.append((group.free_s, missing))
        first_s.append(group.free_s - came)
        after(group.free_s, lambda at: decode(at, request, group, owner, keys[have:], have))

    def decode(
        now: float, request: Request, group: Group, owner: int, keys: list[bytes], have: int
    ) -> None:
        group.cache.computed(owner, keys, have)
        group.decoding[owner] = request.output
        after(now + request.output * TOKEN_S, lambda at: finish(group, owner))

    def finish(group: Group, owner: int) -> None:
        nonlocal left
        left -= 1
        del group.decoding[owner]
        group.cache.pool.free(owner)

    def publish(now: float) -> None:
        for group in groups.values():
            if group.events:
                group.number += 1
                kinds = np.asarray([kind for kind, _ in group.events], dtype=np.uint8)
                keys = fingerprints(b"".join(key for _, key in group.events))
                directory.apply(group.name, Batch(group.number, kinds, keys), now)
                group.events.clear()
        if due:
            after(now + PUBLISH_S, publish)

    after(0.0, publish)
    while due and (left or len(due) > 1):
        now, _, act = heappop(due)
        act(now)
    return {
        "requests": len(first_s),
        "hit_rate": round(hits / prompts, 4),
        "computed_tokens": sum(one.computed for one in groups.values()),
        "first_token_p50_s": round(float(np.median(first_s)), 3),
        "first_token_p99_s": round(float(np.quantile(first_s, 0.99)), 3),
        "choose_us": round(choose_s / len(first_s) * 1e6),
    }


def ideal(requests: Iterable[Request], capacity: int) -> float:
    """Hit rate of an LRU of blocks that never has to keep one for somebody who runs."""
    cache: OrderedDict[bytes, None] = OrderedDict()
    hits = total = 0
    for request in requests:
        keys = list(chain_keys(ROOT, request.prompt[:-1], BLOCK))
        found = next((i for i, key in enumerate(keys) if key not in cache), len(keys))
        hits += found * BLOCK
        total += len(request.prompt)
        for key in reversed(keys):  # the end of a chain goes before its beginning
            cache[key] = None
            cache.move_to_end(key)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits / total


def ours(requests: Iterable[Request], blocks: int, host_blocks: int) -> float:
    """Hit rate of a group's cache, one request after the other."""
    cache = Cache(blocks, host_blocks)
    hits = total = 0
    for request in requests:
        keys = list(chain_keys(ROOT, request.prompt[:-1], BLOCK))
        owner, near, up = cache.begin(keys, -(-len(request.prompt) // BLOCK))
        cache.computed(owner, keys[near + up :], near + up)
        cache.pool.free(owner)
        hits += (near + up) * BLOCK
        total += len(request.prompt)
    return hits / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--sessions", type=int, default=300)
    parser.add_argument("--sessions-per-s", type=float, default=1.0)
    parser.add_argument("--scale", type=float, default=0.125, help="of all lengths")
    parser.add_argument("--blocks", type=int, default=3000, help="of each group's device")
    parser.add_argument("--host-blocks", type=int, default=0, help="of each group's host memory")
    parser.add_argument("--rate", type=float, default=1500.0, help="prefill tokens/s of a group")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = Shape(num_sessions=args.sessions, sessions_per_s=args.sessions_per_s).scaled(args.scale)
    requests = list(trace(shape, args.seed))
    lengths = [len(one.prompt) for one in requests]
    about = {
        "requests": len(requests),
        "mean_prompt": round(float(np.mean(lengths))),
        "max_prompt": max(lengths),
        "seen_before": round(ideal(requests, 1 << 40), 3),
    }
    print(json.dumps({"trace": about}))
    for name, policy in POLICIES.items():
        print(json.dumps({"policy": name} | simulate(requests, policy, args)), flush=True)
    for sizes in ((2000, 0), (8000, 0), (2000, 8000)):
        blocks, host = (round(8 * args.scale * size) for size in sizes)
        best = ideal(requests, max(blocks, host))
        found = ours(requests, blocks, host)
        row = {"device": blocks, "host": host, "hit_rate": round(found, 4), "ideal": round(best, 4)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
