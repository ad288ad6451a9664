"""Streams that run all the time, each compared token for token with an undisturbed run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from arriero.router.client.client import AsyncClient
from arriero.shards.errors import ArrieroError

NUM_KINDS = 12


@dataclass(frozen=True)
class Kind:
    """One request: greedy or seeded, with and without penalties and stop strings."""

    prompt: tuple[int, ...]
    fields: dict[str, object]


def kinds(num_tokens: int) -> list[Kind]:
    """The requests that the load is made of."""
    rng = random.Random(6)
    found = []
    for number in range(NUM_KINDS):
        prompt = tuple(rng.randrange(100, 40000) for _ in range(rng.randrange(4, 60)))
        fields: dict[str, object] = {"max_tokens": num_tokens, "ignore_eos": True, "seed": number}
        fields["temperature"] = 0.0 if number % 2 else 0.8
        if number % 3 == 0:
            fields |= {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
        if number % 4 == 0:
            fields["stop"] = [" the", "zq"]
        if number % 5 == 0:
            fields |= {"n": 2, "temperature": 0.9}
        found.append(Kind(prompt, fields))
    return found


@dataclass
class Got:
    """What came of one request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, int] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    done: bool = False


async def ask(client: AsyncClient, kind: Kind) -> Got:
    """Run a request to its end."""
    got = Got()
    async for message in client.generate(list(kind.prompt), **kind.fields):
        if message.HasField("start"):
            got.weights.add(message.start.weights)
        for one in message.outputs:
            got.tokens.setdefault(one.index, []).extend(one.token_ids)
            got.text[one.index] = got.text.get(one.index, "") + one.text
            if one.finish_reason:
                got.reasons[one.index] = one.finish_reason
        got.done |= message.HasField("usage")
    return got


@dataclass
class Report:
    """What the load saw."""

    finished: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    weights: set[str] = field(default_factory=set)


class Load:
    """So many streams at once, each followed by the next."""

    def __init__(self, addresses: Sequence[str], num_streams: int, num_tokens: int) -> None:
        self.addresses = list(addresses)
        self.report = Report()
        self._num_streams = num_streams
        self._kinds = kinds(num_tokens)
        self._right: dict[str, list[Got]] = {}
        self._unlearnt: dict[str, list[tuple[int, Got]]] = {}
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def learn(self) -> str:
        """Run each request by itself; gives the weights that they ran on.

        What ran on these weights before is compared now.
        """
        client = AsyncClient(self.addresses, timeout_s=120)
        right = [await ask(client, kind) for kind in self._kinds]
        await client.close()
        (weights,) = {one for got in right for one in got.weights}
        self._right[weights] = right
        for which, got in self._unlearnt.pop(weights, []):
            self._compare(which, got, right[which])
        return weights

    @property
    def learnt(self) -> set[str]:
        """The weights whose answers are known."""
        return set(self._right)

    def start(self) -> None:
        """Begin."""
        self._tasks = [asyncio.create_task(self._stream(i)) for i in range(self._num_streams)]

    async def stop(self) -> Report:
        """Let what runs end, and no more begin."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        for weights, left in self._unlearnt.items():
            self.report.wrong.append(f"{len(left)} requests ran on {weights}, which nobody knows")
        return self.report

    async def _stream(self, number: int) -> None:
        rng = random.Random(number)
        client: AsyncClient | None = None
        while not self._stopping:
            which = rng.randrange(len(self._kinds))
            client = AsyncClient(lambda: self._turned(number), timeout_s=180, resume_s=60)
            try:
                got = await ask(client, self._kinds[which])
            except (ArrieroError, OSError) as error:
                self.report.lost.append(f"stream {number}, request {which}: {error}")
                await asyncio.sleep(0.2)
                continue
            except Exception as error:
                self.report.lost.append(f"stream {number}, request {which}: {error!r}")
                continue
            finally:
                await client.close()
            self._check(which, got)

    def _turned(self, number: int) -> list[str]:
        """The gateways that a stream knows of: half of the streams begin at each."""
        return self.addresses[number % 2 :] + self.addresses[: number % 2]

    def _check(self, which: int, got: Got) -> None:
        self.report.finished += 1
        self.report.weights |= got.weights
        if len(got.weights) != 1:
            self.report.wrong.append(f"request {which} ran on {sorted(got.weights)}")
            return
        (weights,) = got.weights
        if weights not in self._right:
            self._unlearnt.setdefault(weights, []).append((which, got))
            return
        self._compare(which, got, self._right[weights][which])

    def _compare(self, which: int, got: Got, due: Got) -> None:
        if (got.tokens, got.text, got.reasons, got.done) != (
            due.tokens,
            due.text,
            due.reasons,
            True,
        ):
            self.report.wrong.append(
                f"request {which}: {got.tokens} {got.reasons} where"
                f" {due.tokens} {due.reasons} was due"
            )
