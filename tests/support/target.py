"""What the fuzzers aim at: a gateway over a real, tiny engine, on an event loop of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.tenants.tenant import QueueLimits
from arriero.router.text.model_card import ModelCard
from arriero.shards.config.group import GroupConfig
from arriero.shards.engine.stats import EngineStats
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, LLAMA_SPECIALS, make_card, make_tokenizer
from support.groups import Group, running
from support.models import tiny_llama

VOCAB = 400


@dataclass
class Target:
    """Where the fuzzers aim."""

    grpc: str
    http: str
    group: Group

    def left(self) -> EngineStats:
        """What the engine still holds a while after the last call."""
        deadline = time.monotonic() + 10
        while (stats := self.group.engine.stats()).blocks_used and time.monotonic() < deadline:
            time.sleep(0.05)
        return stats


class Findings:
    """What a fuzzer saw, from several threads; `close` says it in a line, and fails on faults.

    Args:
        kind: of the fuzzer, for that line.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self.statuses: Counter[str] = Counter()
        self._unstated: list[str] = []
        self._tracebacks: list[str] = []

    def see(self, status: str, case: object, words: str, *, stated: bool) -> None:
        """Take an answer in.

        Args:
            status: its status.
            case: what was asked.
            words: what the client was told.
            stated: the status is one that the API states for such a case.
        """
        shown = f"{status}: {words[:500]}: {case}"
        with self._lock:
            self.statuses[status] += 1
            if not stated:
                self._unstated.append(shown)
            if "Traceback" in words or 'File "' in words:
                self._tracebacks.append(shown)

    def close(self, target: Target, records: Sequence[logging.LogRecord]) -> None:
        """Say what was seen, and raise if anything was wrong."""
        left = target.left()
        logged = [
            record.getMessage()
            for record in records
            if record.exc_info is not None and record.name.startswith("arriero")
        ]
        print(
            f"\n{self._kind}: {self.statuses.total()} cases, {dict(self.statuses)}; "
            f"{len(self._unstated)} answers that are not stated, "
            f"{len(self._tracebacks)} tracebacks to clients, {len(logged)} in the log, "
            f"{left.blocks_used} blocks leaked, {left.num_running + left.num_waiting} requests left"
        )
        assert not self._unstated, self._unstated[:5]
        assert not self._tracebacks, self._tracebacks[:5]
        assert not logged, logged[:5]
        assert (left.num_running, left.num_waiting, left.blocks_used) == (0, 0, 0), left
        assert target.group.engine.failure is None


@contextmanager
def fuzz_target(folder: Path) -> Iterator[Target]:
    """A target whose model is written to `folder`."""
    tokenizer = make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>")
    tiny_llama(folder, vocab=VOCAB, eos=1)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = GroupConfig(model_path=str(folder), dtype="float32", num_blocks=64, max_queued=64)
    with running(config) as group:
        limits = group.engine.config
        card = make_card(tokenizer, LLAMA3, max_model_len=limits.max_model_len, vocab_size=VOCAB)
        with _Serving(group, card) as (gateway, port):
            yield Target(f"127.0.0.1:{port}", f"http://127.0.0.1:{gateway.http_port}", group)


class _Serving:
    """A gateway and its link on an event loop in a thread of its own, as the fuzzers block."""

    def __init__(self, group: Group, card: ModelCard) -> None:
        self._group, self._card = group, card
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._link = LinkServer(group.engine, card)
        config = GatewayConfig(
            http_address="127.0.0.1:0",
            max_message_bytes=1 << 20,
            limits=QueueLimits(max_queued=64, max_wait_s=20),
        )
        self._gateway = Gateway(config)

    def __enter__(self) -> tuple[Gateway, int]:
        self._thread.start()
        return self._gateway, self._run(self._start())

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work):  # noqa: ANN001, ANN202
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _start(self) -> int:
        address = await self._link.start()
        self._group.take = self._link.on_outputs  # type: ignore[method-assign]
        port = await self._gateway.start()
        await self._gateway.set_groups([GroupAddress("g0", self._card.model, address)])
        await eventually_async(lambda: self._gateway.ready, 20)
        return port

    async def _stop(self) -> None:
        await self._gateway.stop(0.5)
        await self._link.stop(0.5)
