"""1,000 lines of `arriero batch run` while the command, gateways and groups end and come back."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.text.model_card import ModelCard
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, FakeEngine, endless, make_card

COUNT, LIMIT_S, STEP_S = 1000, 900.0, 0.02
CONFIG = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",), lost_s=30.0)
COMMAND = (sys.executable, "-m", "arriero.cluster.cli", "batch", "run")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * LIMIT_S)]


@dataclass
class Parts:
    """Gateways and groups in this process; each can be ended at once and started again."""

    cards: list[ModelCard]
    links: list[LinkServer] = field(default_factory=list)
    engines: list[FakeEngine] = field(default_factory=list)
    addresses: list[GroupAddress] = field(default_factory=list)
    gateways: list[Gateway] = field(default_factory=list)

    async def start(self, num_gateways: int) -> None:
        for card in self.cards:
            engine, link, address = await self._group(card)
            self.engines.append(engine)
            self.links.append(link)
            self.addresses.append(address)
        for _ in range(num_gateways):
            self.gateways.append(await self._gateway("127.0.0.1:0"))

    async def _group(self, card: ModelCard) -> tuple[FakeEngine, LinkServer, GroupAddress]:
        engine = FakeEngine(endless, eos=card.eos_token_ids[0], step_s=STEP_S)
        link = LinkServer(engine, card)
        engine.on_outputs = link.on_outputs
        return engine, link, GroupAddress(card.group, card.model, await link.start())

    async def _gateway(self, http: str) -> Gateway:
        gateway = Gateway(replace(CONFIG, http_address=http))
        await gateway.start()
        await gateway.set_groups(self.addresses)
        await eventually_async(lambda: gateway.ready, 120)
        return gateway

    async def replace_gateway(self, number: int) -> None:
        """Another gateway at the same address."""
        http = f"127.0.0.1:{self.gateways[number].http_port}"
        await self.gateways[number].stop(0)
        self.gateways[number] = await self._gateway(http)

    async def replace_group(self, number: int) -> None:
        """Another life of a group, under another id."""
        await self.links[number].stop(0)
        self.engines[number].close()
        self.cards[number] = replace(self.cards[number], group=f"{self.cards[number].group}'")
        engine, link, address = await self._group(self.cards[number])
        self.engines[number], self.links[number], self.addresses[number] = engine, link, address
        for gateway in self.gateways:
            await gateway.set_groups(self.addresses)

    async def stop(self) -> None:
        for gateway in self.gateways:
            await gateway.stop(0.2)
        for link in self.links:
            await link.stop(0.2)
        for engine in self.engines:
            engine.close()

    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{gateway.http_port}" for gateway in self.gateways]


class Command:
    """The command; killed and started again, it resumes the run."""

    def __init__(self, words: list[str], log: Path) -> None:
        self._words, self.log = words, log
        self.process: Process | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self._words, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    async def restart(self, sign: signal.Signals) -> None:
        assert self.process is not None and self.process.returncode is None, self.log.read_text()
        self.process.send_signal(sign)
        await asyncio.wait_for(self.process.wait(), 120)
        await self.start()


def lines(rng: random.Random) -> bytes:
    requests = (
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "tiny", "prompt": f"{number}", "max_tokens": rng.randint(1, 48)},
        }
        for number in range(COUNT)
    )
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("seed", [1, 2])
async def test_each_line_once(llama_tokenizer: Tokenizer, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines(rng))
    parts = Parts([make_card(llama_tokenizer, LLAMA3, group=f"g{number}") for number in range(2)])
    await parts.start(2)
    urls = [word for url in parts.urls() for word in ("--url", url)]
    command = Command([*COMMAND, str(source), str(output), *urls], tmp_path / "log")
    faults: list[Callable[[], Awaitable[None]]] = [
        lambda: command.restart(signal.SIGKILL),
        lambda: command.restart(signal.SIGINT),
        lambda: parts.replace_gateway(rng.randrange(2)),
        lambda: parts.replace_gateway(rng.randrange(2)),
        lambda: parts.replace_group(rng.randrange(2)),
        lambda: parts.replace_group(rng.randrange(2)),
    ]
    rng.shuffle(faults)
    moments = sorted(rng.sample(range(20, 800), len(faults)))
    try:
        await command.start()
        for moment, fault in zip(moments, faults, strict=True):
            await eventually_async(lambda least=moment: num_lines(output) >= least, LIMIT_S)  # type: ignore[misc]
            assert num_lines(output) < COUNT, "the fault comes before the end"
            await fault()
        assert command.process is not None
        code = await asyncio.wait_for(command.process.wait(), LIMIT_S)
    finally:
        if command.process is not None and command.process.returncode is None:
            command.process.kill()
            await command.process.wait()
        await parts.stop()
    assert code == 0, command.log.read_text()
    names = Counter(json.loads(line)["custom_id"] for line in output.read_bytes().splitlines())
    assert names == {f"r{number}": 1 for number in range(COUNT)}
    assert num_lines(tmp_path / "out.errors.jsonl") == 0
    assert f"{COUNT} lines: " in command.log.read_text().splitlines()[-1]
