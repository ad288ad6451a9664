"""An agent's conversation with pauses for tools, while other tenants use the same small group.

    ARRIERO_TEST_MODEL=… python tests/bench/agent_session.py

An agent sends 40 turns to `/v1/responses` over a real gateway; each turn repeats the conversation
and adds the result of a tool. In each pause other tenants send prompts that fill the whole KV pool.
The run is made without hints (a few turns, for the contrast), and with `prompt_cache_key`. Prints a
JSON line for each run: the share of all the agent's prompt tokens that was read from the cache
(`read`), the share of those prompt tokens that an earlier turn had (`read_of_earlier`), and the
first-token time of each turn. The bar: at least 95 % of all prompt tokens read with the hint.

With `--tiny`, a random model of two small layers computes, with the checkpoint's tokenizer and
template: the share is the same, and the times mean nothing. Engine, link, gateway and HTTP are the
product's; the slice has a process of its own.
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
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).parents[1]))

from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.tenants.keys import add_key
from arriero.router.text.model_card import ModelCard
from arriero.shards.config.group import GroupConfig
from arriero.shards.kv.blocks import model_root
from support.eventually import eventually_async
from support.groups import running
from support.models import tiny_llama

BAR = 0.95
WORDS = "the herd walks down to the river where grass is green and snow lies on the pass".split()


@dataclass
class Turns:
    """What the agent saw in each turn: tokens by its usage, and the time of the first token."""

    prompt: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)

    @property
    def read(self) -> float:
        """Share of all prompt tokens that was read from the cache, 0 to 1."""
        return sum(self.cached) / sum(self.prompt)

    @property
    def read_of_earlier(self) -> float:
        """The same of the tokens that an earlier turn had, as prompt or output."""
        return sum(self.cached) / (sum(self.prompt[:-1]) + sum(self.output[:-1]))


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


async def take_turn(
    client: openai.AsyncOpenAI, talk: list[dict[str, Any]], hint: dict[str, Any], turns: Turns
) -> str:
    """A turn of the agent; gives the text."""
    started = time.monotonic()
    first_s = 0.0
    stream = await client.responses.create(
        model="m", input=talk, max_output_tokens=16, temperature=0, store=False, stream=True, **hint
    )
    response = None
    async with stream:
        async for event in stream:
            if event.type == "response.output_text.delta" and not first_s:
                first_s = time.monotonic() - started
            if event.type in ("response.completed", "response.incomplete"):
                response = event.response
    if response is None:
        raise RuntimeError("the stream ended without its last event")
    turns.prompt.append(response.usage.input_tokens)
    turns.cached.append(response.usage.input_tokens_details.cached_tokens)
    turns.output.append(response.usage.output_tokens)
    turns.first_token_s.append(first_s)
    return response.output_text


async def others(client: openai.AsyncOpenAI, rng: random.Random, args: argparse.Namespace) -> None:
    """Prompts of other tenants, one after the other."""
    left = args.others_tokens
    while left > 0:
        answer = await client.completions.create(
            model="m", prompt=words(rng, args.others_prompt), max_tokens=1
        )
        left -= answer.usage.prompt_tokens


async def converse(url: str, agent_key: str, other_key: str, hinted: bool, args: Any) -> Turns:  # noqa: ANN401
    rng = random.Random(1)
    turns = Turns()
    hint = {"prompt_cache_key": "agent-1"} if hinted else {}
    talk: list[dict[str, Any]] = [
        {"role": "developer", "content": words(rng, args.system)},
        {"role": "user", "content": "Find the lost llama."},
    ]
    async with (
        openai.AsyncOpenAI(base_url=url, api_key=agent_key, max_retries=0, timeout=600) as agent,
        openai.AsyncOpenAI(base_url=url, api_key=other_key, max_retries=0, timeout=600) as other,
    ):
        for number in range(args.turns if hinted else min(args.turns, args.turns_without)):
            text = await take_turn(agent, talk, hint, turns)
            talk += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": f"Result {number}: {words(rng, args.result)}"},
            ]
            await others(other, rng, args)  # the tool runs
    return turns


def write_tiny(folder: Path, model: Path) -> None:
    """A tiny model with the text files of `model`."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    tiny_llama(folder, vocab=vocab, max_positions=8192)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())


async def serve_and_run(hinted: bool, args: argparse.Namespace) -> dict[str, Any]:
    config = GroupConfig(
        model_path=args.model,
        num_blocks=args.blocks,
        max_model_len=4096,
        dtype="float32" if args.tiny else "bfloat16",
        threads=args.threads,
    )
    with tempfile.TemporaryDirectory() as folder, running(config, spawn=True) as group:
        limits = group.engine.config
        card = ModelCard.from_folder(
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
        path = Path(folder) / "keys.yaml"
        agent_key = add_key(path, "agent")
        other_key = add_key(path, "others")
        link = LinkServer(group.engine, card)
        group.take = link.on_outputs  # type: ignore[method-assign]
        gateway = Gateway(GatewayConfig(http_address="127.0.0.1:0", keys=path))
        await gateway.start()
        await gateway.set_groups([GroupAddress("g0", "m", await link.start())])
        try:
            await eventually_async(lambda: gateway.ready, 60)
            url = f"http://127.0.0.1:{gateway.http_port}/v1"
            started = time.monotonic()
            turns = await converse(url, agent_key, other_key, hinted, args)
            took_s = time.monotonic() - started
        finally:
            await gateway.stop(0.5)
            await link.stop(0.5)
    later = turns.first_token_s[1:]
    return {
        "hints": hinted,
        "turns": len(turns.prompt),
        "prompt_tokens": sum(turns.prompt),
        "read": round(turns.read, 4),
        "read_of_earlier": round(turns.read_of_earlier, 4),
        "first_token_ms_p50": round(1000 * statistics.median(later)),
        "first_token_ms_max": round(1000 * max(later)),
        "first_token_ms": [round(1000 * seconds) for seconds in turns.first_token_s],
        "cached_tokens": turns.cached,
        "took_s": round(took_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = os.environ.get("ARRIERO_TEST_MODEL")
    parser.add_argument("--model", default=model, required=not model)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model computes")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--turns-without", type=int, default=10, help="turns without hints")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--system", type=int, default=800, help="words of the system prompt")
    parser.add_argument("--result", type=int, default=40, help="words of a tool's result")
    parser.add_argument("--blocks", type=int, default=480, help="blocks of the KV pool")
    parser.add_argument("--others-prompt", type=int, default=1000, help="words of each prompt")
    parser.add_argument("--others-tokens", type=int, default=7000, help="tokens in each pause")
    args = parser.parse_args()
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            write_tiny(Path(folder), Path(args.model))
            args.model = folder
        for hinted in (False, True):
            made[hinted] = asyncio.run(serve_and_run(hinted, args))
            print(json.dumps(made[hinted]), flush=True)
    read = made[True]["read"]
    if read < BAR:
        raise SystemExit(
            f"{read:.1%} of the prompt tokens were read with hints; the bar is {BAR:.0%}"
        )


if __name__ == "__main__":
    main()
