"""Two live groups with one cache and the product's routing, against the same two on their own.

    ARRIERO_TEST_MODEL=… python tests/bench/shared_cache.py

Engines, slices (a process each), links, directory and choice are the product's; requests are a
Mooncake-shaped trace of conversations, scaled to the machine. Only in the product's way do groups
copy from each other; round-robin, least-loaded and prefix-affinity choose among isolated ones.
Prints a JSON line for each way, and the product's ratios to it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from arriero.router.backend import GroupView
from arriero.router.directory.journal import Journal
from arriero.router.link.leader_rpc import PeerGroups, SharedBlocks, tell_shared
from arriero.router.link.server import LinkServer
from arriero.router.routing import migration
from arriero.router.routing.linked_groups import GroupAddress, LinkedGroups
from arriero.router.routing.request_progress import RequestProgress
from arriero.router.text.model_card import ModelCard
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import TierConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.config import engine_config
from arriero.shards.engine.engine import Engine
from arriero.shards.engine.types import EngineRequest, SequenceOutput
from arriero.shards.kv.blocks import model_root
from arriero.shards.kv.host_id import host_name
from arriero.shards.layout.resolve import resolve
from arriero.shards.leader.spawned_group import spawn_group

from traces import Request, Shape, trace  # isort: skip


OURS = "directory"
WAYS: dict[str, Callable[[Sequence[GroupView], int], GroupView]] = {
    "round-robin": lambda views, number: views[number % len(views)],
    "least-loaded": lambda views, number: min(views, key=lambda v: v.load.outstanding_tokens),
    "prefix-affinity": lambda views, number: min(
        views, key=lambda v: (-v.reach.total, v.load.outstanding_tokens)
    ),
}


class Group:
    """An engine, its slice in a process of its own, and its link."""

    async def start(self, name: str, config: GroupConfig, *, shares: bool) -> GroupAddress:
        checkpoint = Checkpoint.open(config.model_path)
        config = resolve(config, checkpoint.config)
        executor = spawn_group(config)
        await asyncio.to_thread(executor.wait_ready, 120)
        limits = engine_config(config, checkpoint.config, checkpoint.digest)
        journal = Journal(limits.num_blocks)

        def on_outputs(outputs: Sequence[SequenceOutput]) -> None:
            self.link.on_outputs(outputs)

        self.engine = Engine(limits, executor, on_outputs, on_event=journal.note)
        card = ModelCard.from_folder(
            config.model_path,
            model="m",
            group=name,
            layout="tp1 pp1",
            digest=checkpoint.digest,
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            bos_token_id=None,
            eos_token_ids=limits.eos_token_ids,
            max_sequences=limits.max_sequences,
            cache_root=model_root(limits.cache_salt),
            block_size=limits.block_size,
            memory=host_name() if shares else "",
        )
        peers = PeerGroups() if shares else None
        self.link = LinkServer(self.engine, card, kv=self.answer, journal=journal, peers=peers)
        address = await self.link.start()
        self.engine.start()
        return GroupAddress(name, "m", address)

    async def answer(self, action: str, asked: memoryview) -> SharedBlocks:
        assert action == "shared"
        return await tell_shared(self.engine, asked)

    async def stop(self) -> None:
        await self.link.stop(0.0)
        await asyncio.to_thread(self.engine.stop)


async def run(way: str, requests: list[Request], args: argparse.Namespace) -> dict[str, Any]:
    """A trace through two groups."""
    config = GroupConfig(
        model_path=args.model,
        dtype="bfloat16",
        threads=1,
        num_blocks=args.blocks,
        max_model_len=2048,
        tiers=TierConfig(host_bytes=args.host_mb << 20),
    )
    groups = [Group(), Group()]
    addresses = await asyncio.gather(
        *(one.start(f"g{i}", config, shares=way == OURS) for i, one in enumerate(groups))
    )
    linked = LinkedGroups(lambda: None)
    await linked.set_groups(addresses)
    while len(linked.groups()) < len(groups):
        await asyncio.sleep(0.05)
    text, _ = linked.find("m")
    begun = time.monotonic()
    first_s: list[float] = []

    async def ask(number: int, request: Request) -> None:
        await asyncio.sleep(request.at_s - (time.monotonic() - begun))
        asked = EngineRequest(
            request_id=f"r{number}",
            prompt=tuple(request.prompt.tolist()),
            params=SamplingParams(
                max_tokens=request.output, temperature=0.0, seed=0, ignore_eos=True
            ),
        )

        def candidates() -> Sequence[GroupView]:
            views = linked.sharing("m", text, asked)
            return [WAYS[way](views, number)] if way in WAYS else views

        came = time.monotonic()
        async with aclosing(
            migration.run(linked, RequestProgress(asked), candidates, 10.0)
        ) as steps:
            first = True
            async for _ in steps:
                if first:
                    first_s.append(time.monotonic() - came)
                    first = False

    await asyncio.gather(*(ask(number, one) for number, one in enumerate(requests)))
    stats = [one.engine.stats() for one in groups]
    await linked.close()
    for one in groups:
        await one.stop()
    return {
        "way": way,
        "requests": len(requests),
        "prompt_tokens": sum(one.prompt_tokens for one in stats),
        "computed_tokens": sum(one.prompt_tokens - one.cached_tokens for one in stats),
        "copied_blocks": sum(one.tiers.get("loaded", 0) for one in stats),
        "first_token_p50_ms": round(float(np.median(first_s)) * 1e3),
        "first_token_p90_ms": round(float(np.quantile(first_s, 0.9)) * 1e3),
        "took_s": round(time.monotonic() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = os.environ.get("ARRIERO_TEST_MODEL")
    parser.add_argument("--model", default=model, required=not model)
    parser.add_argument("--sessions", type=int, default=40)
    parser.add_argument("--sessions-per-s", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, default=1500)
    parser.add_argument("--host-mb", type=int, default=512)
    parser.add_argument("--ways", default=",".join([OURS, *WAYS]))
    args = parser.parse_args()
    shape = Shape(
        sessions_per_s=args.sessions_per_s,
        num_sessions=args.sessions,
        system_prompts=6,
        mean_system=300,
        mean_message=120,
        mean_output=16,
        mean_turns=4,
        think_s=8.0,
        max_prompt=1600,
    )
    requests = list(trace(shape, seed=1))
    made: dict[str, dict[str, Any]] = {}
    for way in args.ways.split(","):
        made[way] = asyncio.run(run(way, requests, args))
        print(json.dumps(made[way]), flush=True)
    for way in made.keys() - {OURS} if OURS in made else ():
        ratios = {
            name: round(made[OURS][name] / made[way][name], 3)
            for name in ("computed_tokens", "first_token_p50_ms", "first_token_p90_ms")
        }
        print(json.dumps({f"{OURS} to {way}": ratios}))


if __name__ == "__main__":
    main()
