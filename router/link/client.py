"""The gateway's end of a link: one long-lived connection to one leader.

Connects, and connects again with growing pauses when the leader is lost; until then the requests
in flight end in `Unavailable` with the cause. Knows frames; knows nothing of text or of which
group is best.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import ssl
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

from arriero.router.backend import GroupLoad
from arriero.router.directory.events import Batch, Snapshot
from arriero.router.link import messages as frames
from arriero.router.link.framing import FramedConnection
from arriero.router.text.model_card import ModelCard
from arriero.router.tls import LINK_NAME
from arriero.shards.engine.types import EngineRequest, SequenceOutput
from arriero.shards.errors import (
    ArrieroError,
    ContextTooLong,
    InvalidRequest,
    Overloaded,
    Unavailable,
)

log = logging.getLogger(__name__)

SILENCE_S = 4.0
"""A leader that says nothing for so long is lost; it sends its load twice a second."""
BACKOFF_S = (0.05, 2.0)
"""First and longest pause between attempts to connect."""
EXPECTED_OUTPUT = 512
"""Output tokens that a request is expected to take at most, for weighing load only: without it a
request that leaves `max_tokens` open would weigh as much as the whole context."""


class LinkClient:
    """A link to one leader.

    Args:
        address: host and port of its `LinkServer`.
        on_change: called on the event loop whenever the link comes up or goes down.
        token: the leader's, shown first of all.
        tls: of the connection; None speaks in the clear.
        group_id: of the group that is meant; a leader of another (an address is used again in
            time) is not spoken to. None takes whoever answers.
        on_kv: told what becomes of the group's KV blocks.
    """

    def __init__(
        self,
        address: str,
        on_change: Callable[[], None] | None = None,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        group_id: str | None = None,
        on_kv: Callable[[Batch | Snapshot], None] = lambda told: None,
    ) -> None:
        self.address = address
        self._on_kv = on_kv
        self._token = token
        self._tls = tls
        self._group_id = group_id
        self._on_change = on_change
        self._card: ModelCard | None = None
        self._up = False
        self._cause = "not connected yet"
        self._stats: dict[str, Any] = {}
        self._moved_s = time.monotonic()
        self._handles = itertools.count()
        self._calls: dict[int, Call] = {}
        self._names: dict[int, str] = {}
        self._by_name: dict[str, int] = {}
        self._wire: FramedConnection | None = None
        self._heard_s = 0.0
        self._over: asyncio.Future[str] | None = None
        self._reached = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether requests can be sent now."""
        return self._up and not self._stats.get("draining", False)

    @property
    def up(self) -> bool:
        """Whether the leader is there, draining or not."""
        return self._up

    @property
    def card(self) -> ModelCard:
        """The card that the leader gave last.

        Raises:
            Unavailable: it was never reached.
        """
        if self._card is None:
            raise Unavailable(f"leader at {self.address}: {self._cause}")
        return self._card

    @property
    def cause(self) -> str:
        """Why it is not connected."""
        return "the group is draining" if self._up else self._cause

    @property
    def load(self) -> GroupLoad:
        """How busy the group is."""
        return GroupLoad(
            outstanding_tokens=sum(call.outstanding for call in self._calls.values()),
            prefill_tokens=sum(call.prefill for call in self._calls.values()),
            num_running=self._stats.get("num_running", 0),
            num_waiting=self._stats.get("num_waiting", 0),
            stalled_s=time.monotonic() - self._moved_s,
        )

    @property
    def role(self) -> str:
        """Part of a request that the group is for, as the leader last said."""
        return str(self._stats.get("role", "both"))

    @property
    def stats(self) -> Mapping[str, Any]:
        """`EngineStats` as the leader last sent it."""
        return self._stats

    async def connect(self, timeout_s: float) -> None:
        """Start the link and wait for the leader's card.

        Raises:
            Unavailable: not within `timeout_s`; the link keeps trying.
        """
        self.start()
        try:
            async with asyncio.timeout(timeout_s):
                await self._reached.wait()
        except TimeoutError:
            raise Unavailable(
                f"leader at {self.address} not reached in {timeout_s:g} s: {self._cause}"
            ) from None

    def start(self) -> None:
        """Keep the link up from now on."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_up())

    async def close(self) -> None:
        """Drop the link; requests in flight end in `Unavailable`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._tell(False, "the gateway has dropped the group")

    def generate(
        self, request: EngineRequest, num_cached: int = 0, peer: tuple[str, str] | None = None
    ) -> Call:
        """Run a request; closing what is returned early cancels it.

        Iterating raises `InvalidRequest` or `Overloaded` when the engine refused it, and
        `Unavailable` when the leader is lost or draining; the text is the cause.

        Args:
            request: it.
            num_cached: tokens of its prompt that the group is thought to have.
            peer: address and token of a leader whose group is thought to have more.

        Raises:
            Unavailable: the leader cannot be asked now.
        """
        if not self.connected:
            raise Unavailable(f"leader at {self.address}: {self.cause}")
        handle = next(self._handles)
        call = Call(request, num_cached, partial(self._ended, handle))
        self._calls[handle] = call
        self._names[handle] = request.request_id
        self._by_name[request.request_id] = handle
        self._send(frames.submit_message(handle, request, peer))
        return call

    def _ended(self, handle: int, call: Call) -> None:
        """Nobody reads a call any more."""
        if self._calls.pop(handle, None) is None:
            return
        self._by_name.pop(self._names.pop(handle), None)
        if call.running and call.error is None:
            self._send(["cancel", handle])

    def cancel(self, request_id: str) -> None:
        """Stop a request in the engine; its iterator ends in a "cancelled" output."""
        handle = self._by_name.get(request_id)
        if handle is not None:
            self._send(["cancel", handle])
            call = self._calls[handle]
            for index in sorted(call.unfinished):
                call.put(
                    SequenceOutput(request_id=request_id, index=index, finish_reason="cancelled")
                )
            call.wake()

    def _send(self, message: list[Any]) -> None:
        if self._wire is not None:
            self._wire.write(frames.pack([message]))

    async def _keep_up(self) -> None:
        pause = BACKOFF_S[0]
        while True:
            try:
                cause = await self._run()
            except (OSError, ssl.SSLError, TimeoutError) as error:
                cause = str(error) or "it does not answer"
            except Exception as error:
                log.exception("link to %s failed", self.address)
                cause = f"{type(error).__name__}: {error}"
            if self._up:
                log.warning("link to leader at %s lost: %s", self.address, cause)
                pause = BACKOFF_S[0]
            self._tell(False, cause)
            # Spread the gateways' attempts, so that a leader that comes back is not stormed.
            await asyncio.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 2, BACKOFF_S[1])

    async def _run(self) -> str:
        """One life of the connection, from hello to loss; gives the cause of its end."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[str] = loop.create_future()
        self._over = over
        wire = FramedConnection(self._take, self._end)
        host, _, port = self.address.rpartition(":")
        name = None if self._tls is None else LINK_NAME
        async with asyncio.timeout(SILENCE_S):
            await loop.create_connection(
                lambda: wire, host.strip("[]"), int(port), ssl=self._tls, server_hostname=name
            )
        self._wire, self._heard_s = wire, time.monotonic()
        wire.write(frames.pack(["token", self._token]))
        try:
            while (left_s := self._heard_s + SILENCE_S - time.monotonic()) > 0:
                done, _ = await asyncio.wait([over], timeout=left_s)
                if done:
                    return over.result()
            return f"silent for {SILENCE_S:g} s"
        finally:
            self._wire = None
            wire.abort("")

    def _end(self, cause: str) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(cause or "it closed the link")

    def _take(self, frame: bytes) -> None:
        """Take a frame from the leader in."""
        self._heard_s = time.monotonic()
        try:
            message = frames.unpack(frame)
            kind = message[0]
            if kind == "step":
                self._on_step(message)
            elif kind == "stats":
                self._on_stats(message[1])
            elif kind == "kv":
                self._on_kv(Batch.from_wire(message[1:]))
            elif kind == "kv_all":
                self._on_kv(Snapshot.from_wire(message[1:]))
            elif kind == "refused":
                self._on_refused(*message[1:])
            elif kind == "hello":
                self._on_hello(message)
            elif kind == "bye":
                self._end(message[1])
        except ArrieroError as error:
            self._end(str(error))
        except Exception as error:
            log.exception("a frame of the leader at %s cannot be used", self.address)
            self._end(f"{type(error).__name__}: {error}")

    def _on_hello(self, message: list[Any]) -> None:
        if message[1] != frames.VERSION:
            raise Unavailable(f"it speaks version {message[1]} of the link, not {frames.VERSION}")
        card = ModelCard.from_wire(message[2])
        if self._group_id not in (None, card.group):
            raise Unavailable(f"group {card.group} answers in its place")
        self._card = card
        self._tell(True, "")

    def _on_stats(self, stats: dict[str, Any]) -> None:
        was, steps = self.connected, self._stats.get("steps")
        self._stats = stats
        if not (stats["num_running"] or stats["num_waiting"]) or stats["steps"] != steps:
            self._moved_s = time.monotonic()
        if was != self.connected and self._on_change is not None:
            self._on_change()

    def _on_step(self, frame: list[Any]) -> None:
        touched = []
        for handle, output in frames.read_step(frame, self._names):
            call = self._calls[handle]
            call.put(output)
            touched.append(call)
        for call in touched:
            call.wake()

    def _on_refused(self, handle: int, kind: str, text: str, detail: Any) -> None:  # noqa: ANN401
        call = self._calls.get(handle)
        if call is None:
            return
        if kind == "InvalidRequest":
            call.fail(InvalidRequest(detail, text))
        elif kind == "ContextTooLong":
            call.fail(ContextTooLong(detail, text))
        elif kind == "Overloaded":
            call.fail(Overloaded(text, detail))
        else:
            call.fail(Unavailable(text))

    def _tell(self, up: bool, cause: str) -> None:
        """The link came up or went down."""
        changed = up != self._up
        self._up, self._cause = up, cause
        if not up:
            self._stats = {}
            for call in self._calls.values():
                call.fail(Unavailable(f"the group's leader at {self.address} was lost: {cause}"))
        (self._reached.set if up else self._reached.clear)()
        if changed and self._on_change is not None:
            self._on_change()


class Call:
    """One request in the group, which is read by iterating it; see `Running`.

    Args:
        request: what is asked.
        num_cached: tokens of its prompt that the group is thought to have.
        on_end: called once nobody reads it any more.
    """

    __slots__ = ("_expected", "_on_end", "_outputs", "_prompt", "_waiter", "error", "unfinished")

    def __init__(
        self, request: EngineRequest, num_cached: int, on_end: Callable[[Call], None]
    ) -> None:
        self.unfinished = set(range(request.params.n))
        self.error: ArrieroError | None = None
        self._on_end = on_end
        self._outputs: list[SequenceOutput] = []
        self._waiter: asyncio.Future[None] | None = None
        self._prompt = max(1, len(request.prompt) + len(request.resumed) - num_cached)
        limit = min(request.params.max_tokens or EXPECTED_OUTPUT, EXPECTED_OUTPUT)
        self._expected = limit * request.params.n

    @property
    def running(self) -> bool:
        """Whether more will come, or waits to be taken."""
        return bool(self.unfinished or self._outputs)

    @property
    def prefill(self) -> int:
        """Prompt tokens still to compute, until the first token is here."""
        return self._prompt

    @property
    def outstanding(self) -> int:
        """Tokens still to compute, as far as one can expect."""
        return self._prompt + max(self._expected, 0)

    def put(self, output: SequenceOutput) -> None:
        """Take one in; `wake` tells the reader."""
        if output.index not in self.unfinished:
            return  # a step that was under way when the sample was cancelled
        self._outputs.append(output)
        self._expected -= len(output.tokens)
        self._prompt = 0
        if output.finish_reason is not None:
            self.unfinished.discard(output.index)

    def fail(self, error: ArrieroError) -> None:
        """End it in an error, after what has come."""
        if self.error is None:
            self.error = error
        self.wake()

    def wake(self) -> None:
        """Let the reader look."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Self:
        """Itself."""
        return self

    async def __anext__(self) -> list[SequenceOutput]:
        """What has come since the last time; what came before a failure is given first."""
        while not self._outputs:
            if not self.unfinished:
                self._on_end(self)
                raise StopAsyncIteration
            if self.error is not None:
                self._on_end(self)
                raise self.error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        outputs, self._outputs = self._outputs, []
        return outputs

    async def aclose(self) -> None:
        """Want no more of it."""
        self._on_end(self)
