"""A soak: mixed traffic for a long time, and every process stays as large as it was.

    ARRIERO_TEST_MODEL=models/SmolLM2-135M-Instruct python tests/chaos/soak.py --minutes 60

A quarter of the load streams text (greedy and seeded, penalties, stop strings, several samples), a
quarter is cancelled half-way, a quarter calls a tool and answers from its result, and a quarter are
conversations over HTTP. After the warm-up, resident memory, open files and threads of every process
of the deployment are sampled; at the end no KV block may be in use. Prints one JSON object; exits 1
if a bar is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import psutil

from arriero.cluster import deployment_file as state
from arriero.cluster.control.admin_client import AdminClient
from arriero.cluster.hosts import local_cluster as local
from arriero.router.client.client import AsyncClient
from arriero.router.proto.arriero.v1 import inference_pb2 as pb

MAX_GROWTH = 0.03
CITIES = ("Lima", "Cusco", "La Paz", "Quito", "Salta")
WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": json.dumps(
        {
            "type": "object",
            "properties": {"city": {"enum": list(CITIES)}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        }
    ),
}
# SmolLM2's own template shows no tools
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Traffic:
    """So many callers at once, each asking again and again."""

    def __init__(self, address: str, http: str, pause_s: float) -> None:
        self.pause_s = pause_s
        self.client = AsyncClient(address, timeout_s=120)
        self.http = openai.AsyncOpenAI(base_url=f"http://{http}/v1", api_key="none", timeout=120)
        self.counts = {"generate": 0, "cancelled": 0, "tool calls": 0, "chat over HTTP": 0}
        self.errors: list[str] = []

    async def run(self, number: int, until_s: float) -> None:
        """One caller."""
        rng = random.Random(number)
        kinds: list[Callable[[random.Random], Any]] = [
            self._generate, self._cancel, self._call, self._chat,
        ]  # fmt: skip
        while time.monotonic() < until_s:
            try:
                await rng.choice(kinds)(rng)
            except Exception as error:
                self.errors.append(repr(error)[:200])
                await asyncio.sleep(1)
            await asyncio.sleep(self.pause_s)

    async def _generate(self, rng: random.Random) -> None:
        fields: dict[str, object] = {"max_tokens": rng.randrange(4, 40), "seed": rng.randrange(99)}
        fields["temperature"] = rng.choice([0.0, 0.8])
        if rng.random() < 0.3:
            fields |= {"repetition_penalty": 1.2, "stop": ["\n\n"]}
        if rng.random() < 0.2:
            fields["n"] = 2
        prompt = [rng.randrange(100, 40000) for _ in range(rng.randrange(3, 200))]
        async for _ in self.client.generate(prompt, **fields):
            pass
        self.counts["generate"] += 1

    async def _cancel(self, rng: random.Random) -> None:
        left = rng.randrange(1, 12)
        async for _ in self.client.generate([5, 6, 7], max_tokens=200, ignore_eos=True):
            left -= 1
            if not left:
                break
        self.counts["cancelled"] += 1

    async def _call(self, rng: random.Random) -> None:
        question = f"How is the weather in {rng.choice(CITIES)}?"
        asked: list[dict[str, Any]] = [{"role": "user", "content": question}]
        calls: list[pb.ToolCall] = []
        fields = {"max_tokens": 200, "seed": rng.randrange(99), "tools": [pb.Tool(**WEATHER)]}
        fields |= {"tool_choice": pb.TOOL_CHOICE_REQUIRED, "parallel_tool_calls": False}
        async for response in self.client.chat(asked, **fields):
            calls.extend(call for output in response.outputs for call in output.tool_calls)
        (call,) = calls
        city = json.loads(call.arguments)["city"]
        asked += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f"{city}: sunny, 21 degrees", "tool_call_id": call.id},
        ]
        async for _ in self.client.chat(asked, max_tokens=16, temperature=0):
            pass
        self.counts["tool calls"] += 1

    async def _chat(self, rng: random.Random) -> None:
        question = f"How is the weather in {rng.choice(CITIES)}?"
        stream = await self.http.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            max_tokens=24,
            temperature=0,
            stream=True,
        )
        async for _ in stream:
            pass
        self.counts["chat over HTTP"] += 1


def look(session: int) -> dict[str, dict[str, float]]:
    """Memory, files and threads of each process of the cluster, by name and pid."""
    found = {}
    for pid in local.members(session):
        try:
            one = psutil.Process(pid)
            command = one.cmdline()
            name = command[0] if command and command[0].startswith("ray::") else one.name()
            found[f"{name} {pid}"] = {
                "rss": float(one.memory_info().rss),
                "files": float(one.num_fds()),
                "threads": float(one.num_threads()),
            }
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def growth(samples: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """How much each process grew from the first third of the samples to the last, as a share."""
    third = max(1, len(samples) // 3)
    there = set.intersection(*(set(one) for one in samples))
    grown = {}
    for name in sorted(there):
        grown[name] = {}
        for what in ("rss", "files", "threads"):
            early = statistics.median(one[name][what] for one in samples[:third])
            late = statistics.median(one[name][what] for one in samples[-third:])
            grown[name][what] = (late - early) / early if early else 0.0
    return grown


async def soak(
    admin: AdminClient,
    noted: state.Deployment,
    session: int,
    minutes: float,
    callers: int,
    pause_s: float,
) -> dict[str, object]:
    """Run the traffic and watch; gives the report."""
    begun_s = time.monotonic()
    until_s = begun_s + minutes * 60
    traffic = Traffic(noted.gateway, noted.http, pause_s)
    tasks = [asyncio.create_task(traffic.run(number, until_s)) for number in range(callers)]
    warm_s = begun_s + minutes * 60 / 4
    await asyncio.sleep(warm_s - time.monotonic())
    samples = []
    while time.monotonic() < until_s:
        samples.append(look(session))
        await asyncio.sleep(max(1.0, minutes * 60 / 120))
    await asyncio.gather(*tasks)
    await traffic.client.close()
    await traffic.http.close()
    blocks = -1
    for _ in range(40):
        groups = (await asyncio.to_thread(admin.status)).groups
        blocks = sum(one.blocks_used for one in groups)
        if not blocks:
            break
        await asyncio.sleep(0.25)
    grown = growth(samples)
    broken = [
        f"{name}: {what} grew by {share:.1%}"
        for name, shares in grown.items()
        for what, share in shares.items()
        if share > MAX_GROWTH
    ]
    if blocks:
        broken.append(f"{blocks} blocks in use at the end")
    if traffic.errors:
        broken.append(f"{len(traffic.errors)} errors, first {traffic.errors[0]}")
    return {
        "minutes": minutes,
        "requests": traffic.counts,
        "samples": len(samples),
        "worst": {
            what: max(((shares[what], name) for name, shares in grown.items()), default=(0.0, ""))
            for what in ("rss", "files", "threads")
        },
        "blocks_in_use": blocks,
        "broken": broken,
    }


def arriero(folder: Path, *args: str) -> None:
    """Run a command on the deployment that is noted in `folder`."""
    subprocess.run(
        [sys.executable, "-m", "arriero.cluster.cli", *args],
        env=os.environ | {"ARRIERO_STATE": str(folder)},
        check=True,
    )


def main() -> int:
    """Deploy, soak, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds between two requests of a caller"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="arriero-soak-") as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        for one in Path(os.environ["ARRIERO_TEST_MODEL"]).resolve().iterdir():
            (model / one.name).symlink_to(one)
        (model / "chat_template.jinja").write_text(TEMPLATE)
        flags = ("--pp", "2", "--port", "0", "--http-port", "0", "--kv-memory", "128MiB")
        try:
            arriero(folder, "up", "--model", str(model), "--name", "demo", *flags)
            noted = state.read(folder)
            assert noted is not None and noted.local_session is not None
            with AdminClient.of(noted) as admin:
                report = asyncio.run(
                    soak(
                        admin,
                        noted,
                        noted.local_session,
                        given.minutes,
                        given.callers,
                        given.pause,
                    )
                )
        finally:
            arriero(folder, "down")
    print(json.dumps(report, indent=1))
    return 1 if report["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
