"""What a guard costs: first-token time and tokens a second with and without a safety policy.

    ARRIERO_TEST_MODEL=… python tests/bench/guard_beside.py [--requests 10] [--tiny] [--json]

A model and a guard, two groups in this process on the same cores, behind a gateway whose tenants
have no policy, a check of the input, of the output, or of both. The policies take turns, with
prompts of the same lengths. The guard has tiny random weights and is held to the answer `safe`, so
that its prompts, its queue and the windows cost what they cost, and its weights next to nothing;
`--guard DIR` takes a real guard. Prints a JSON line after each round of a policy, and at the end a
line for each policy: the median and the 99th percentile of the first-token time, tokens a second,
and what the policy adds. With `--tiny`, a random model computes, with the checkpoint's tokenizer:
what is left is the gateway's work. `--json`: the last line is one JSON object of the policies.
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
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import GatewayConfig
from arriero.router.tenants.keys import add_key
from arriero.router.tenants.safety import SafetyPolicy
from arriero.router.tenants.tenant import Tenant
from arriero.shards.engine.engine import Engine
from arriero.shards.engine.types import EngineRequest
from support.fronted_groups import FrontedGroups, ServedModel, fronted_groups
from support.tiny_chat import write_tiny_chat

Figures = dict[str, str | float]
WINDOW = 32
POLICIES = {
    "none": None,
    "input": SafetyPolicy(guard="guard", input="refuse", timeout_s=60.0),
    "output": SafetyPolicy(guard="guard", output="cut", window=WINDOW, timeout_s=60.0),
    "both": SafetyPolicy(
        guard="guard", input="refuse", output="cut", window=WINDOW, timeout_s=60.0
    ),
}


@dataclass
class Run:
    """Times of the requests under a policy."""

    first_token_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    elapsed_s: float = 0.0

    def add(self, run: Run) -> None:
        """Add the requests of another run of the same policy."""
        self.first_token_s += run.first_token_s
        self.num_tokens += run.num_tokens
        self.elapsed_s += run.elapsed_s

    @property
    def p99_s(self) -> float:
        """99th percentile of the first-token times."""
        return sorted(self.first_token_s)[int(0.99 * len(self.first_token_s))]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second, of all streams together."""
        return self.num_tokens / self.elapsed_s


def hold_to_safe(engine: Engine) -> None:
    """Let a model of random weights answer `safe` to everything."""
    from llguidance import LLMatcher

    submit, grammar = engine.submit, LLMatcher.grammar_from_regex("safe")

    def submit_safe(request: EngineRequest) -> None:
        submit(replace(request, params=replace(request.params, grammar=grammar)))

    engine.submit = submit_safe  # type: ignore[method-assign]


def prompts(label: str, count: int) -> Iterator[list[dict[str, str]]]:
    """Conversations of about a hundred words; the label keeps them out of the prefix cache."""
    rng = random.Random(7)
    words = "river stone llama valley market salt wool bridge road pass snow night".split()
    for number in range(count):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(60, 140)))
        yield [{"role": "user", "content": f"{label} {number}: continue this. {text}"}]


async def ask(client: AsyncClient, messages: list[dict[str, str]], length: int, run: Run) -> None:
    started_s, first_s = time.monotonic(), None
    fields = {"model": "model", "max_tokens": length, "ignore_eos": True, "temperature": 0.0}
    async for answer in client.chat(messages, **fields):
        for output in answer.outputs:
            if output.token_ids and first_s is None:
                first_s = time.monotonic() - started_s
            run.num_tokens += len(output.token_ids)
    assert first_s is not None, "no token was shown"
    run.first_token_s.append(first_s)


async def measure(client: AsyncClient, args: argparse.Namespace, label: str, run: Run) -> None:
    """A closed loop of streams."""
    waiting = prompts(label, args.requests)

    async def stream() -> None:
        for messages in waiting:
            await ask(client, messages, args.tokens, run)

    started_s = time.monotonic()
    await asyncio.gather(*(stream() for _ in range(args.streams)))
    run.elapsed_s += time.monotonic() - started_s


def figures(name: str, run: Run) -> Figures:
    """The figures of a policy's requests."""
    return {
        "policy": name,
        "requests": len(run.first_token_s),
        "first_token_p50_s": round(statistics.median(run.first_token_s), 4),
        "first_token_p99_s": round(run.p99_s, 4),
        "tokens_per_s": round(run.tokens_per_s, 1),
    }


def added(run: Run, plain: Run) -> Figures:
    """What a policy adds to the first-token time, and what it leaves of the tokens a second."""
    p50_s, plain_s = (statistics.median(r.first_token_s) for r in (run, plain))
    return {
        "added_first_token_s": round(p50_s - plain_s, 4),
        "share_of_tokens_per_s": round(run.tokens_per_s / plain.tokens_per_s, 3),
    }


def show(line: Figures) -> Figures:
    """Print the figures of a part at once."""
    print(json.dumps(line), flush=True)
    return line


async def compare(args: argparse.Namespace, folder: Path) -> list[Figures]:
    """The figures of each policy; prints each part."""
    model = args.model
    if args.tiny:
        model = write_tiny_chat(folder / "model", args.model, max_positions=4096)
    guard = args.guard or write_tiny_chat(folder / "guard", args.model, seed=1, max_positions=8192)
    kind = {} if args.guard else {"guard": "llama-guard-3"}
    models = [
        ServedModel(name="model", folder=model, group={"max_model_len": 2048}),
        ServedModel(name="guard", folder=guard, group={"max_model_len": 8192}, card=kind),
    ]
    keys = folder / "keys.json"
    tenants = tuple(Tenant(name=name, safety=policy) for name, policy in POLICIES.items())
    config = GatewayConfig(http_address="127.0.0.1:0", keys=keys, tenants=tenants, guard="guard")
    tokens = {name: add_key(keys, name) for name in POLICIES}
    async with AsyncExitStack() as stack:
        front: FrontedGroups = await stack.enter_async_context(fronted_groups(models, config))
        if not args.guard:
            hold_to_safe(front.groups[1].engine)
        clients = {
            name: await stack.enter_async_context(AsyncClient(front.address, api_key=key))
            for name, key in tokens.items()
        }
        for client in clients.values():  # imports, templates and grammars
            await ask(client, next(prompts("first", 1)), 2, Run())
        runs = {name: Run() for name in POLICIES}
        for number in range(args.rounds):
            for name, client in clients.items():
                run = Run()
                await measure(client, args, f"{name} {number}", run)
                show({"round": number, **figures(name, run)})
                runs[name].add(run)
        return [show(figures(name, run) | added(run, runs["none"])) for name, run in runs.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = os.environ.get("ARRIERO_TEST_MODEL")
    parser.add_argument("--model", type=Path, default=model, required=not model)
    parser.add_argument("--guard", type=Path, help="checkpoint of a guard")
    parser.add_argument("--requests", type=int, default=10, help="of a policy in a round")
    parser.add_argument("--tokens", type=int, default=96, help="output tokens of a request")
    parser.add_argument("--streams", type=int, default=1, help="requests at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model computes")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args()
    args.model = Path(args.model)
    with tempfile.TemporaryDirectory() as folder:
        policies = asyncio.run(compare(args, Path(folder)))
    if args.json:
        print(json.dumps({"policies": policies}))


if __name__ == "__main__":
    main()
