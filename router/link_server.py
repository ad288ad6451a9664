"""The leader's end of the links: one bidirectional stream for each gateway.

Takes requests from gateways to the engine, and each step's outputs back, one frame a step and
gateway. When a gateway's stream ends, for whatever reason, its requests are cancelled. Knows
frames and the engine's three methods; knows nothing of text or of how the engine works.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import grpc
import grpc.aio

from arriero.router import frames
from arriero.router.card import ModelCard
from arriero.router.directory.journal import Journal
from arriero.router.directory.prefixes import CacheRoot
from arriero.router.link_names import CHANNEL_OPTIONS, CONNECT, KV, SERVICE, TOKEN_KEY
from arriero.router.peers import Peers
from arriero.router.tracing import Tracing
from arriero.shards.engine.types import EngineRequest, EngineStats, SequenceOutput
from arriero.shards.errors import ArrieroError, InvalidRequest, Overloaded, Unavailable

log = logging.getLogger(__name__)

SERVER_OPTIONS = [
    *CHANNEL_OPTIONS,
    # A gateway whose node is gone sends no reset; these find out within 10 s.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
]
STATS_INTERVAL_S = 0.5
KV_INTERVAL_S = 0.05
"""Between two batches of changed KV blocks."""
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
"""Answers what operators ask of a group's KV cache: an action and its arguments."""


class LinkServer:
    """Serves the links of one leader.

    Args:
        engine: takes the requests.
        card: the first thing a gateway is told.
        address: host and port; port 0 picks a free one.
        token: what a gateway must show; "" lets anyone link who can reach the address.
        credentials: of TLS; None listens in the clear.
        tracing: makes a span for each request that came with its caller's; None makes none.
        kv: answers about the KV cache; None refuses.
        journal: of the KV blocks, for gateways to route by; None tells them nothing.
        peers: other leaders, to copy blocks from; None copies none.
    """

    def __init__(
        self,
        engine: Engine,
        card: ModelCard,
        address: str = "127.0.0.1:0",
        *,
        token: str = "",
        credentials: grpc.ServerCredentials | None = None,
        tracing: Tracing | None = None,
        kv: KvAnswer | None = None,
        journal: Journal | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._kv, self._journal, self._peers = kv, journal, peers
        self._tracing = tracing
        self._spans: dict[str, _Span] = {}
        self._token = token
        self._credentials = credentials
        self._engine = engine
        self._card = card
        self._address = address
        self._links: set[_Link] = set()
        self._asking: set[asyncio.Task[None]] = set()
        self._owners: dict[str, tuple[_Link, int]] = {}
        self._draining = False
        self._server: grpc.aio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._idle = asyncio.Event()

    async def start(self) -> str:
        """Listen; gives the bound address.

        Raises:
            OSError: the address cannot be bound.
        """
        self._loop = asyncio.get_running_loop()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handlers = {
            CONNECT: grpc.stream_stream_rpc_method_handler(self._connect),
            KV: grpc.unary_unary_rpc_method_handler(self._answer_kv),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}: {error}") from error
        await self._server.start()
        self._tasks = [asyncio.create_task(self._send_stats())]
        if self._journal is not None:
            self._tasks.append(asyncio.create_task(self._tell_blocks(self._journal)))
        return f"{self._address.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running ones finish for `grace_s` seconds, then close."""
        self._draining = True
        if self._owners:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), grace_s)
            except TimeoutError:
                log.warning("stopped with %d requests unfinished", len(self._owners))
        for link in self._links:
            link.send(["bye", "the group is stopping"])
        for task in self._tasks:
            task.cancel()
        if self._peers is not None:
            await self._peers.close()
        if self._server is not None:
            await self._server.stop(1.0 if self._links else None)

    def on_outputs(self, outputs: Sequence[SequenceOutput]) -> None:
        """Hand over what a step gave; called from the engine's thread, once a step."""
        assert self._loop is not None, "on_outputs before start"
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            log.debug("outputs after the loop closed")

    def _deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue  # cancelled while the step ran
            link, handle = owner
            link.add_output(handle, output)
            if self._spans and (span := self._spans.get(output.request_id)) is not None:
                span.add(output)
            if output.finish_reason is not None and link.sample_done(handle):
                self._forget(output.request_id)

    def _forget(self, request_id: str) -> None:
        self._owners.pop(request_id, None)
        if (span := self._spans.pop(request_id, None)) is not None:
            span.end(self._engine.stats())
        if not self._owners:
            self._idle.set()

    async def _answer_kv(
        self, raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        await self._check_token(context)
        if self._kv is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this leader has no KV desk")
        try:
            action, asked = frames.unpack(raw)
            return frames.pack(await self._kv(action, asked))
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ArrieroError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def _check_token(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        shown = str(dict(context.invocation_metadata() or ()).get(TOKEN_KEY, ""))
        if not hmac.compare_digest(shown.encode(), self._token.encode()):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "the gateway showed another token than the leader's",
            )

    async def _connect(
        self, incoming: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        await self._check_token(context)
        link = _Link(context)
        self._links.add(link)
        link.send(["hello", frames.VERSION, self._card.to_wire()])
        link.send(self._stats_frame())
        if self._journal is not None:
            link.send(["kv_all", *self._journal.snapshot().to_wire()])
        writer = asyncio.create_task(link.write_all())
        reader = asyncio.create_task(self._read(link, incoming))
        try:
            done, _ = await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (error := task.exception()) is not None:
                    log.warning("link with gateway %s lost: %s", context.peer(), error)
        finally:
            writer.cancel()
            reader.cancel()
            self._links.discard(link)
            for request_id in link.requests():
                self._forget(request_id)
                self._engine.cancel(request_id)

    async def _tell_blocks(self, journal: Journal) -> None:
        """Tell all gateways what becomes of the KV blocks."""
        while True:
            await asyncio.sleep(KV_INTERVAL_S)
            batch = journal.take()
            if batch is not None:
                frame = ["kv", *batch.to_wire()]
                for link in self._links:
                    link.send(frame)

    async def _read(self, link: _Link, incoming: AsyncIterator[bytes]) -> None:
        async for frame in incoming:
            for message in frames.unpack(frame):
                if message[0] == "submit":
                    self._submit(link, message)
                elif message[0] == "cancel":
                    request_id = link.drop(message[1])
                    if request_id is not None:
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
            task = asyncio.create_task(self._with_peer(self._peers, peer, link, handle, request))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _with_peer(
        self, peers: Peers, peer: tuple[str, str], link: _Link, handle: int, request: EngineRequest
    ) -> None:
        """Find out what a peer has of the prompt, then hand the request over."""
        root = CacheRoot(self._card.cache_root, self._card.block_size)
        found = await peers.blocks(peer, root, request.prompt)
        if self._owners.get(request.request_id) == (link, handle):  # else it was cancelled
            self._hand_over(link, handle, replace(request, peer=found))

    def _hand_over(self, link: _Link, handle: int, request: EngineRequest) -> None:
        try:
            self._engine.submit(request)
        except Exception as error:
            link.drop(handle)
            self._forget(request.request_id)
            _refuse(link, handle, error)

    async def _send_stats(self) -> None:
        """The load, now and then; also the sign of life that gateways watch for."""
        while True:
            await asyncio.sleep(STATS_INTERVAL_S)
            frame = self._stats_frame()
            for link in self._links:
                link.send(frame)

    def _stats_frame(self) -> list[Any]:
        return ["stats", asdict(self._engine.stats()) | {"draining": self._draining}]


class _Link:
    """One gateway's stream: its requests by handle, and what waits to be written."""

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._context = context
        self._frames: list[list[Any]] = []
        self._outputs: list[tuple[int, SequenceOutput]] = []
        self._wake = asyncio.Event()
        self._running: dict[int, list[Any]] = {}  # handle: [request id, samples still running]

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
        self._frames.append(frame)
        self._wake.set()

    def add_output(self, handle: int, output: SequenceOutput) -> None:
        self._outputs.append((handle, output))
        self._wake.set()

    async def write_all(self) -> None:
        """Write what waits; steps that pile up behind a slow reader share a frame."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if len(self._outputs) > MAX_PENDING:
                raise Unavailable(f"it left {len(self._outputs)} outputs unread")
            outputs, self._outputs = self._outputs, []
            waiting, self._frames = self._frames, []
            if outputs:
                waiting.append(frames.step_frame(outputs))
            for frame in waiting:
                await self._context.write(frames.pack(frame))
                if frame[0] == "bye":
                    return


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
        return ["InvalidRequest", str(error), error.field]
    if isinstance(error, Overloaded):
        return ["Overloaded", str(error), error.retry_after_s]
    return ["Unavailable", str(error), None]
