"""First tokens of interactive requests, with and without a batch behind, on a group in process.

    ARRIERO_TEST_MODEL=… python tests/bench/batch_beside.py [--requests 150] [--minutes 7] [--json]

Interactive requests arrive at random times, with the same lengths at the same times in each run,
and with other tokens, so that no run reads the prefix cache of another. Runs without and with a
batch take turns, and the batch keeps 64 requests in the queue. Prints a JSON line for each run, and
at the end the ratio of the 99th percentiles of the first-token times over all runs. The bar: at
most 1.15. Without `--rate`, requests come at a quarter of the rate that the group answers one after
another; a run has `--requests` of them, or fewer where all runs would take longer than `--minutes`.
The group is busy while it runs steps; `idle_time_used` is the share of the time idle without a
batch that the batch makes busy. Engine, link, gateway and admission are the product's. With
`--tiny`, a random model of two small layers computes, with the checkpoint's tokenizer; the bar is
then that of the gateway alone. `--json`: the last line is one JSON object of all lines.
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
from arriero.shards.engine.engine import Engine
from arriero.shards.engine.types import EngineConfig
from arriero.shards.kv.blocks import model_root
from support.fronted import fronted
from support.tiny_chat import write_tiny_chat

BAR = 1.15
PROMPT, OUTPUT = (64, 192), (8, 32)
IN_QUEUE = 64


@dataclass
class Run:
    """First-token times of interactive requests, the group's busy time, tokens of the batch."""

    first_token_s: list[float] = field(default_factory=list)
    batch_tokens: int = 0
    elapsed_s: float = 0.0
    busy_s: float = 0.0


class BusyTime:
    """Adds up the seconds of an engine's steps; between steps the engine waits for work."""

    def __init__(self, engine: Engine) -> None:
        self.seconds = 0.0
        self._step = engine.step
        engine.step = self._timed_step  # type: ignore[method-assign]

    def _timed_step(self) -> bool:
        started_s = time.monotonic()
        has_work = self._step()
        self.seconds += time.monotonic() - started_s
        return has_work


async def ask_once(
    client: AsyncClient, lengths: random.Random, tokens: random.Random
) -> tuple[float, int]:
    """Seconds to the first token, and number of tokens, of a request with a prompt of its own.

    Args:
        client: of the gateway.
        lengths: draws the lengths of prompt and answer.
        tokens: draws the tokens of the prompt.
    """
    prompt = [tokens.randint(100, 40_000) for _ in range(lengths.randint(*PROMPT))]
    started_s, first_s, num_tokens = time.monotonic(), 0.0, 0
    answers = client.generate(prompt, max_tokens=lengths.randint(*OUTPUT), ignore_eos=True)
    async for answer in answers:
        for output in answer.outputs:
            if output.token_ids and not num_tokens:
                first_s = time.monotonic() - started_s
            num_tokens += len(output.token_ids)
    return first_s, num_tokens


async def interactive(client: AsyncClient, rate: float, count: int, run: Run, tag: str) -> None:
    rng = random.Random(5)

    async def later(wait_s: float, seed: int) -> None:
        await asyncio.sleep(wait_s)
        tokens = random.Random(f"{tag} {seed}")
        first_s, _ = await ask_once(client, random.Random(seed), tokens)
        run.first_token_s.append(first_s)

    at_s = 0.0
    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            at_s += rng.expovariate(rate)
            tasks.create_task(later(at_s, number))


async def batch(client: AsyncClient, run: Run, tag: str) -> None:
    async def keep_asking(seed: int) -> None:
        rng = random.Random(f"{tag} batch {seed}")
        while True:
            _, num_tokens = await ask_once(client, rng, rng)
            run.batch_tokens += num_tokens

    async with asyncio.TaskGroup() as tasks:
        for seed in range(IN_QUEUE):
            tasks.create_task(keep_asking(seed))


async def measured(
    address: str, rate: float, count: int, busy: BusyTime, tag: str, *, beside: bool
) -> Run:
    run = Run()
    started_s, busy_before_s = time.monotonic(), busy.seconds
    async with AsyncClient(address) as client, AsyncClient(address, background=True) as behind:
        asking = asyncio.create_task(batch(behind, run, tag)) if beside else None
        await interactive(client, rate, count, run, tag)
        run.elapsed_s = time.monotonic() - started_s
        run.busy_s = busy.seconds - busy_before_s
        if asking is not None:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
    return run


def p99(times_s: list[float]) -> float:
    return sorted(times_s)[int(0.99 * len(times_s))]


def show(figures: dict[str, float | bool]) -> dict[str, float | bool]:
    """Print the figures of a part at once."""
    print(json.dumps(figures), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = os.environ.get("ARRIERO_TEST_MODEL")
    parser.add_argument("--model", default=model, required=not model)
    parser.add_argument("--requests", type=int, default=150, help="most requests of a run")
    parser.add_argument("--minutes", type=float, default=7.0, help="most minutes of all runs")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model computes")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            write_tiny_chat(Path(folder), Path(args.model))
            args.model = folder
        lines, ratio = asyncio.run(compare(args))
    if args.json:
        print(json.dumps({"runs": lines[:-1], "all": lines[-1]}))
    sys.exit(ratio > BAR)


async def compare(args: argparse.Namespace) -> tuple[list[dict[str, float | bool]], float]:
    """The printed lines, and the ratio of the 99th percentiles with and without a batch."""
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
        address, busy = front.client._address, BusyTime(front.group.engine)
        rng = random.Random(3)
        started_s = time.monotonic()
        for _ in range(5):
            await ask_once(front.client, rng, rng)
        rate = args.rate or 5 / (time.monotonic() - started_s) / 4
        count = min(args.requests, max(1, int(rate * 60 * args.minutes / (2 * args.rounds))))
        runs: dict[bool, list[Run]] = {False: [], True: []}
        lines = []
        for number in range(args.rounds):
            for beside in (False, True):
                tag = f"round {number} {beside}"
                run = await measured(address, rate, count, busy, tag, beside=beside)
                runs[beside].append(run)
                lines.append(show(of_run(run, rate, beside=beside)))
    lines.append(show(of_all(runs)))
    return lines, float(lines[-1]["ratio_of_p99"])


def of_run(run: Run, rate: float, *, beside: bool) -> dict[str, float | bool]:
    """The figures of a run."""
    return {
        "batch": beside,
        "requests": len(run.first_token_s),
        "rate": round(rate, 3),
        "p50_s": round(statistics.median(run.first_token_s), 4),
        "p99_s": round(p99(run.first_token_s), 4),
        "busy_share": round(run.busy_s / run.elapsed_s, 3),
        "batch_tokens_per_s": round(run.batch_tokens / run.elapsed_s, 1),
    }


def of_all(runs: dict[bool, list[Run]]) -> dict[str, float | bool]:
    """The figures of all runs, with and without a batch."""
    times = {beside: [s for run in runs[beside] for s in run.first_token_s] for beside in runs}
    busy = {
        beside: sum(run.busy_s for run in runs[beside]) / sum(run.elapsed_s for run in runs[beside])
        for beside in runs
    }
    idle = 1 - busy[False]
    return {
        "ratio_of_p99": round(p99(times[True]) / p99(times[False]), 3),
        "bar": BAR,
        "ratio_of_p50": round(statistics.median(times[True]) / statistics.median(times[False]), 3),
        "idle_share_without_batch": round(idle, 3),
        "idle_share_with_batch": round(1 - busy[True], 3),
        "idle_time_used": round((busy[True] - busy[False]) / idle, 3) if idle > 0 else 0.0,
    }


if __name__ == "__main__":
    main()
