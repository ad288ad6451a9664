"""The leader's end of the links: one connection for each gateway.

Takes requests from gateways to the engine, and each step's outputs back, one frame a step and
gateway. When a gateway's connection ends, for whatever reason, its requests are cancelled. Knows
frames and the engine's three methods; knows nothing of text or of how the engine works.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from arriero.router import roles
from arriero.router.directory.journal import Journal
from arriero.router.directory.prefixes import CacheRoot
from arriero.router.link import messages as frames
from arriero.router.link.framing import FRAME_BYTES, GREETING_BYTES, FramedConnection
from arriero.router.link.leader_rpc import HAND_OVER_S, PATIENCE_S, PeerGroups
from arriero.router.observability.tracing import Tracing
from arriero.router.roles import Role
from arriero.router.text.model_card import ModelCard
from arriero.shards.engine.types import EngineRequest, EngineStats, SequenceOutput
from arriero.shards.errors import (
    ArrieroError,
    ContextTooLong,
    InvalidRequest,
    Overloaded,
    Unavailable,
)

log = logging.getLogger(__name__)

GREETING_S = 5.0
"""Who has not said by then who it is, is let go."""
STATS_INTERVAL_S = 0.5
CLOSE_S = 1.0
"""How long a gateway is waited for to take the last frames."""
KV_INTERVAL_S = 0.05
"""Between two batches of changed KV blocks."""
KV_QUIET_S = 0.5
"""Likewise once nothing has changed for `KV_CALM_S`, until the next output."""
KV_CALM_S = 5.0
MAX_PENDING = 200_000
"""Outputs that may wait for a gateway that does not read; past it the gateway is let go."""


class Engine(Protocol):
    """What a leader's engine must have; all three return at once, and from any thread."""

    def submit(self, request: EngineRequest) -> None:
        """Take a request, or raise `InvalidRequest`, `Overloaded` or `Unavailable`."""

    def cancel(self, request_id: str) -> None:
        """Stop a request; does nothing when it is not running."""

    def stats(self) -> EngineStats:
        """The load now."""


KvAnswer = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Answers what operators and other leaders ask of a group's KV cache: an action, its arguments."""


class LinkServer:
    """Serves the links of one leader, and answers questions about its KV cache (see `peers`).

    Args:
        engine: takes the requests.
        card: the first thing a gateway is told.
        address: host and port; port 0 picks a free one.
        token: what a gateway must show; "" lets anyone link who can reach the address.
        tls: of the listener; None listens in the clear.
        tracing: makes a span for each request that came with its caller's; None makes none.
        kv: answers about the KV cache; None refuses.
        journal: of the KV blocks, for gateways to route by; None tells them nothing.
        peers: other leaders, to copy blocks from; None copies none.

    Attributes:
        role: part of a request that the group is for, as gateways are told with the load; it may be
            changed at any time.
    """

    def __init__(
        self,
        engine: Engine,
        card: ModelCard,
        address: str = "127.0.0.1:0",
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        tracing: Tracing | None = None,
        kv: KvAnswer | None = None,
        journal: Journal | None = None,
        peers: PeerGroups | None = None,
    ) -> None:
        self.role: Role = "both"
        self._kv, self._journal, self._peers = kv, journal, peers
        self._tracing = tracing
        self._spans: dict[str, _Span] = {}
        self._token = token
        self._tls = tls
        self._engine = engine
        self._card = card
        self._address = address
        self._links: set[_Link] = set()
        self._asking: set[asyncio.Task[None]] = set()
        self._owners: dict[str, tuple[_Link, int]] = {}
        self._draining = False
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._idle = asyncio.Event()
        self._stirred = asyncio.Event()

    async def start(self) -> str:
        """Listen; gives the bound address.

        Raises:
            OSError: the address cannot be bound.
        """
        self._loop = asyncio.get_running_loop()
        host, _, port = self._address.rpartition(":")
        try:
            self._server = await self._loop.create_server(
                lambda: _Link(self).wire, host.strip("[]"), int(port), ssl=self._tls
            )
        except OSError as error:
            raise OSError(f"cannot listen on {self._address}: {error.strerror}") from error
        self._tasks = [asyncio.create_task(self._send_stats())]
        if self._journal is not None:
            self._tasks.append(asyncio.create_task(self._tell_blocks(self._journal)))
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running ones finish for `grace_s` seconds, then close."""
        self._draining = True
        if self._owners:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), grace_s)
            except TimeoutError:
                log.warning("stopped with %d requests unfinished", len(self._owners))
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        for link in list(self._links):
            link.send(["bye", "the group is stopping"])
            link.wire.close()
        for _ in range(int(CLOSE_S / 0.01)):
            if not self._links:
                break
            await asyncio.sleep(0.01)

    def on_outputs(self, outputs: Sequence[SequenceOutput]) -> None:
        """Hand over what a step gave; called from the engine's thread, once a step."""
        assert self._loop is not None, "on_outputs before start"
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            log.debug("outputs after the loop closed")

    def _deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        touched = set()
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue  # cancelled while the step ran
            link, handle = owner
            link.outputs.append((handle, output))
            touched.add(link)
            if self._spans and (span := self._spans.get(output.request_id)) is not None:
                span.add(output)
            if output.finish_reason is not None and link.sample_done(handle):
                self._forget(output.request_id)
        for link in touched:
            link.flush()
        if touched:
            self._stirred.set()

    def _forget(self, request_id: str) -> None:
        self._owners.pop(request_id, None)
        if (span := self._spans.pop(request_id, None)) is not None:
            span.end(self._engine.stats())
        if not self._owners:
            self._idle.set()

    def admit(self, link: _Link, greeting: bytes) -> None:
        """A gateway says who it is: it is told the card, or sent away.

        Who greets with "ask" is none: it is told nothing but what it asks.
        """
        try:
            kind, token = frames.unpack(greeting)
        except Exception:  # whatever it is, it is no gateway
            link.wire.abort("it does not speak as a gateway does")
            return
        if kind not in ("token", "ask") or not hmac.compare_digest(
            str(token).encode(), self._token.encode()
        ):
            link.send(["bye", "the gateway showed another token than the leader's"])
            link.wire.close()
            return
        link.wire.limit = FRAME_BYTES
        link.asks = kind == "ask"
        if link.asks:
            return
        self._links.add(link)
        link.send(["hello", frames.VERSION, self._card.to_wire()])
        link.send(self._stats_frame())
        if self._journal is not None:
            link.send(["kv_all", *self._journal.snapshot().to_wire()])

    def take(self, link: _Link, frame: bytes) -> None:
        """What a gateway that was let in sends."""
        try:
            if link.asks:
                self._start(self._answer(link, *frames.unpack(frame)))
                return
            for message in frames.unpack(frame):
                if message[0] == "submit":
                    self._submit(link, message)
                elif message[0] == "cancel":
                    self._cancel(link, message[1])
                else:
                    raise ValueError(f"a message of kind {message[0]!r}")
        except Exception as error:
            link.wire.abort(f"it sent what cannot be read: {type(error).__name__}: {error}")

    def _cancel(self, link: _Link, handle: int) -> None:
        request_id = link.drop(handle)
        if request_id is not None:
            self._forget(request_id)
            self._engine.cancel(request_id)

    def lost(self, link: _Link, cause: str) -> None:
        """A connection is over; its requests are cancelled."""
        if cause:
            log.warning("link with gateway %s lost: %s", link.wire.peer, cause)
        self._links.discard(link)
        for request_id in link.requests():
            self._forget(request_id)
            self._engine.cancel(request_id)

    def _submit(self, link: _Link, message: list[Any]) -> None:
        handle: int = message[1]
        try:
            request = frames.read_submit(message)
            if self._draining:
                raise Unavailable("the group is draining")
            if request.request_id in self._owners:
                raise InvalidRequest(
                    "request_id", f"`request_id`={request.request_id!r} is running already"
                )
            # Before the engine has it, since outputs may come from its thread at once.
            self._owners[request.request_id] = (link, handle)
            link.add_request(handle, request.request_id, request.params.n)
        except Exception as error:
            _refuse(link, handle, error)
            return
        if self._tracing is not None and request.trace:
            self._spans[request.request_id] = _Span(self._tracing, request, self._card.group)
        peer = frames.read_peer(message)
        if peer is None or self._peers is None:
            self._hand_over(link, handle, request)
        else:
            self._start(self._with_peer(self._peers, peer, link, handle, request))

    async def _with_peer(
        self,
        peers: PeerGroups,
        peer: tuple[str, str],
        link: _Link,
        handle: int,
        request: EngineRequest,
    ) -> None:
        """Find out what a peer has of the prompt, then hand the request over."""
        root = CacheRoot.of(self._card, request)
        if root is not None:
            patience_s = HAND_OVER_S if request.resumed else PATIENCE_S
            tokens = request.prompt + request.resumed
            found = await peers.blocks(peer, root, tokens, patience_s)
            request = replace(request, peer=found)
        if self._owners.get(request.request_id) == (link, handle):  # else it was cancelled
            self._hand_over(link, handle, request)

    def _hand_over(self, link: _Link, handle: int, request: EngineRequest) -> None:
        try:
            self._engine.submit(request)
        except Exception as error:
            link.drop(handle)
            self._forget(request.request_id)
            _refuse(link, handle, error)

    async def _answer(self, link: _Link, action: str, asked: dict[str, Any]) -> None:
        """Answer a question about the KV cache, or take a role."""
        try:
            if action == "role":
                self.role = roles.read(asked.get("role"))
                for gateway in self._links:
                    gateway.send(self._stats_frame())
                link.send(["answer", {"role": self.role}])
                return
            if self._kv is None:
                raise InvalidRequest("action", "this leader answers nothing about its KV cache")
            link.send(["answer", await self._kv(action, asked)])
        except Exception as error:
            if not isinstance(error, ArrieroError):
                log.exception("a question about the KV cache could not be answered")
            link.send(["refused", str(error) or type(error).__name__])

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _tell_blocks(self, journal: Journal) -> None:
        """Tell all gateways what becomes of the KV blocks."""
        calm_s = 0.0
        while True:
            self._stirred.clear()
            if calm_s < KV_CALM_S:
                await asyncio.sleep(KV_INTERVAL_S)
            else:  # an idle leader looks up less often
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stirred.wait(), KV_QUIET_S)
            batch = journal.next_batch()
            calm_s += KV_INTERVAL_S
            if batch is not None or self._stirred.is_set():
                calm_s = 0.0
            if batch is not None:
                frame = ["kv", *batch.to_wire()]
                for link in self._links:
                    link.send(frame)

    async def _send_stats(self) -> None:
        """The load, now and then; also the sign of life that gateways watch for."""
        while True:
            await asyncio.sleep(STATS_INTERVAL_S)
            frame = self._stats_frame()
            for link in self._links:
                link.send(frame)

    def _stats_frame(self) -> list[Any]:
        more = {"draining": self._draining, "role": self.role}
        return ["stats", asdict(self._engine.stats()) | more]


class _Link:
    """One gateway's connection: its requests by handle, and outputs that wait to be written."""

    def __init__(self, server: LinkServer) -> None:
        self.outputs: list[tuple[int, SequenceOutput]] = []
        self.asks = False
        self.wire = FramedConnection(self._take, self._closed, GREETING_BYTES)
        self.wire.on_writable = self.flush
        self._server = server
        self._running: dict[int, list[Any]] = {}  # handle: [request id, samples still running]
        self._admitted = False
        loop = asyncio.get_running_loop()
        self._late = loop.call_later(GREETING_S, self.wire.abort, "it did not say who it is")

    def _take(self, frame: bytes) -> None:
        if self._admitted:
            self._server.take(self, frame)
        else:
            self._late.cancel()
            self._admitted = True
            self._server.admit(self, frame)

    def _closed(self, cause: str) -> None:
        self._late.cancel()
        self._server.lost(self, cause)

    def requests(self) -> list[str]:
        return [request_id for request_id, _ in self._running.values()]

    def add_request(self, handle: int, request_id: str, samples: int) -> None:
        self._running[handle] = [request_id, samples]

    def drop(self, handle: int) -> str | None:
        entry = self._running.pop(handle, None)
        return None if entry is None else entry[0]

    def sample_done(self, handle: int) -> bool:
        """Count one sample of the request off; whether it was the last."""
        entry = self._running[handle]
        entry[1] -= 1
        if entry[1] <= 0:
            del self._running[handle]
            return True
        return False

    def send(self, frame: list[Any]) -> None:
        self.wire.write(frames.pack(frame))

    def flush(self) -> None:
        """Write the outputs that wait; steps that pile up behind a slow reader share a frame."""
        if len(self.outputs) > MAX_PENDING:
            self.wire.abort(f"it left {len(self.outputs)} outputs unread")
        elif self.outputs and not self.wire.full:
            outputs, self.outputs = self.outputs, []
            self.send(frames.step_frame(outputs))


class _Span:
    """A request's span in the group: when its output began, in how many steps, and how it ended.

    The times of a step's phases are means over the group's last steps, which requests share.
    """

    __slots__ = ("_num_tokens", "_reason", "_steps", "_trace")

    def __init__(self, tracing: Tracing, request: EngineRequest, group: str) -> None:
        facts = {"arriero.request_id": request.request_id, "arriero.group": group}
        self._trace = tracing.begin("group", request.trace, facts)
        self._num_tokens = self._steps = 0
        self._reason = "cancelled"

    def add(self, output: SequenceOutput) -> None:
        if not self._steps:
            self._trace.event("first step", {"arriero.cached_tokens": output.num_cached})
        self._steps += 1
        self._num_tokens += len(output.tokens)
        self._reason = output.finish_reason or self._reason

    def end(self, stats: EngineStats) -> None:
        facts: dict[str, str | int | float] = {
            "arriero.steps": self._steps,
            "gen_ai.usage.output_tokens": self._num_tokens,
            "arriero.end": self._reason,
        }
        facts |= {f"arriero.step_us.{phase}": mean for phase, mean in stats.step_us.items()}
        self._trace.end(facts)


def _refuse(link: _Link, handle: int, error: Exception) -> None:
    """Tell a gateway why its request is not taken."""
    if isinstance(error, ArrieroError):
        link.send(["refused", handle, *_refusal(error)])
        return
    log.error("submit failed", exc_info=error)
    link.send(["refused", handle, "Unavailable", f"the engine failed: {error}", None])


def _refusal(error: ArrieroError) -> list[Any]:
    if isinstance(error, InvalidRequest):
        kind = "ContextTooLong" if isinstance(error, ContextTooLong) else "InvalidRequest"
        return [kind, str(error), error.field]
    if isinstance(error, Overloaded):
        return ["Overloaded", str(error), error.retry_after_s]
    return ["Unavailable", str(error), None]
