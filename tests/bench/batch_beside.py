"""First tokens of interactive requests, with and without a batch behind, on a group in process.

    ARRIERO_TEST_MODEL=… python tests/bench/batch_beside.py [--requests 150] [--rate 0] [--rounds 2]

Interactive requests arrive at random times, the same in each run; runs without and with a batch
take turns, and the batch keeps 64 requests in the queue. Prints a JSON line for each run and the
ratio of the 99th percentiles of the first-token times over all runs. The bar: at most 1.15.
Without `--rate`, requests come at a quarter of the rate that the group answers one after another.
Engine, link, gateway and admission are the product's. With `--tiny`, a random model of two small
layers computes, with the checkpoint's tokenizer; the bar is then that of the gateway alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from arriero.router.client.client import AsyncClient
from arriero.router.text.model_card import ModelCard
from arriero.shards.config.group import GroupConfig
from arriero.shards.engine.types import EngineConfig
from arriero.shards.kv.blocks import model_root
from support.fronted import fronted
from support.tiny_chat import write_tiny_chat

BAR = 1.15
PROMPT, OUTPUT = (64, 192), (8, 32)
IN_QUEUE = 64


@dataclass
class Run:
    """First-token times of interactive requests, and tokens of the batch beside."""

    first_token_s: list[float] = field(default_factory=list)
    batch_tokens: int = 0
    elapsed_s: float = 0.0


async def ask_once(client: AsyncClient, rng: random.Random) -> tuple[float, int]:
    """Seconds to the first token, and number of tokens."""
    prompt = [rng.randint(100, 40_000) for _ in range(rng.randint(*PROMPT))]
    started_s, first_s, num_tokens = time.monotonic(), 0.0, 0
    answers = client.generate(prompt, max_tokens=rng.randint(*OUTPUT), ignore_eos=True)
    async for answer in answers:
        for output in answer.outputs:
            if output.token_ids and not num_tokens:
                first_s = time.monotonic() - started_s
            num_tokens += len(output.token_ids)
    return first_s, num_tokens


async def interactive(client: AsyncClient, rate: float, count: int, run: Run) -> None:
    rng = random.Random(5)

    async def later(wait_s: float, seed: int) -> None:
        await asyncio.sleep(wait_s)
        first_s, _ = await ask_once(client, random.Random(seed))
        run.first_token_s.append(first_s)

    at_s = 0.0
    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            at_s += rng.expovariate(rate)
            tasks.create_task(later(at_s, number))


async def batch(client: AsyncClient, run: Run) -> None:
    async def keep_asking(seed: int) -> None:
        rng = random.Random(10_000 + seed)
        while True:
            _, num_tokens = await ask_once(client, rng)
            run.batch_tokens += num_tokens

    async with asyncio.TaskGroup() as tasks:
        for seed in range(IN_QUEUE):
            tasks.create_task(keep_asking(seed))


async def measured(address: str, rate: float, count: int, *, beside: bool) -> Run:
    run = Run()
    started_s = time.monotonic()
    async with AsyncClient(address) as client, AsyncClient(address, background=True) as behind:
        asking = asyncio.create_task(batch(behind, run)) if beside else None
        await interactive(client, rate, count, run)
        run.elapsed_s = time.monotonic() - started_s
        if asking is not None:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
    return run


def p99(times_s: list[float]) -> float:
    return sorted(times_s)[int(0.99 * len(times_s))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.environ.get("ARRIERO_TEST_MODEL"))
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model computes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            write_tiny_chat(Path(folder), Path(args.model))
            args.model = folder
        ratio = asyncio.run(compare(args))
    print(json.dumps({"ratio_of_p99": round(ratio, 3), "bar": BAR}))
    sys.exit(ratio > BAR)


async def compare(args: argparse.Namespace) -> float:
    """The ratio of the 99th percentiles with and without a batch; prints each run."""
    config = GroupConfig(
        model_path=args.model, num_blocks=2048, max_model_len=1024, threads=args.threads
    )

    def card(limits: EngineConfig) -> ModelCard:
        return ModelCard.from_folder(
            args.model,
            model="m",
            group="g0",
            layout="tp1",
            digest="d",
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            bos_token_id=1,
            eos_token_ids=limits.eos_token_ids,
            max_sequences=limits.max_sequences,
            cache_root=model_root(limits.cache_salt),
            block_size=limits.block_size,
        )

    async with fronted(config, card) as front:
        address = front.client._address
        rng = random.Random(3)
        started_s = time.monotonic()
        for _ in range(5):
            await ask_once(front.client, rng)
        rate = args.rate or 5 / (time.monotonic() - started_s) / 4
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.rounds):
            for beside in (False, True):
                run = await measured(address, rate, args.requests, beside=beside)
                times[beside] += run.first_token_s
                figures = {
                    "batch": beside,
                    "rate": round(rate, 3),
                    "p50_s": round(statistics.median(run.first_token_s), 4),
                    "p99_s": round(p99(run.first_token_s), 4),
                    "batch_tokens_per_s": round(run.batch_tokens / run.elapsed_s, 1),
                }
                print(json.dumps(figures), flush=True)
    return p99(times[True]) / p99(times[False])


if __name__ == "__main__":
    main()
