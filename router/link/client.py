"""The gateway's end of a link: one long-lived connection to a leader.

After the loss of the leader the client connects again with growing pauses, and the requests in
flight end with `Unavailable` and the cause. Knows frames; knows nothing of text or routing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from arriero.router.backend import GroupLoad
from arriero.router.directory.events import Batch, Snapshot
from arriero.router.link import messages as frames
from arriero.router.link.call import Call
from arriero.router.link.framing import FramedConnection
from arriero.router.text.model_card import ModelCard
from arriero.router.tls import LINK_NAME
from arriero.shards.engine.stats import EngineStats
from arriero.shards.engine.types import EngineRequest, SequenceOutput
from arriero.shards.errors import ArrieroError, Unavailable
from arriero.shards.protocol import wire

log = logging.getLogger(__name__)

SILENCE_S = 4.0
"""Seconds of silence after which a leader counts as lost; leaders send twice a second."""
BACKOFF_S = (0.05, 2.0)
"""Shortest and longest pause between two attempts to connect, in seconds."""
_NO_STATS = frames.Stats(EngineStats())
"""Load of a group before the first report of a leader."""


class LinkClient:
    """A link to a leader.

    Args:
        address: host and port of the leader's `LinkServer`.
        on_change: called on the event loop when the link comes up or goes down.
        token: secret that the leader requires.
        tls: TLS of the connection; None for a connection in the clear.
        group_id: expected group; the client rejects the leader of any other group, since a new
            group may reuse an address. None accepts any group.
        on_kv: called with changes and snapshots of the group's KV blocks.
    """

    def __init__(
        self,
        address: str,
        on_change: Callable[[], None] | None = None,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        group_id: str | None = None,
        on_kv: Callable[[Batch | Snapshot], None] = lambda update: None,
    ) -> None:
        self.address = address
        self._on_kv = on_kv
        self._token = token
        self._tls = tls
        self._group_id = group_id
        self._on_change = on_change
        self._card: ModelCard | None = None
        self._weights = ""  # compat key of the card
        self._up = False
        self._cause = "not connected yet"
        self._stats = _NO_STATS
        self._progress_s = time.monotonic()
        self._handles = itertools.count()
        self._calls: dict[int, Call] = {}
        self._request_ids: dict[int, str] = {}
        self._handle_of: dict[str, int] = {}
        self._connection: FramedConnection | None = None
        self._last_frame_s = 0.0
        self._closed: asyncio.Future[str] | None = None
        self._up_event = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether requests can be sent now."""
        return self._up and not self._stats.draining

    @property
    def up(self) -> bool:
        """Whether the link is up; the leader may be draining."""
        return self._up

    @property
    def card(self) -> ModelCard:
        """The last model card of the leader.

        Raises:
            Unavailable: the link has never been up.
        """
        if self._card is None:
            raise Unavailable(f"leader at {self.address}: {self._cause}")
        return self._card

    @property
    def cause(self) -> str:
        """Why the link is not connected."""
        return "the group is draining" if self._up else self._cause

    @property
    def load(self) -> GroupLoad:
        """Load of the group."""
        return GroupLoad(
            outstanding_tokens=sum(call.outstanding for call in self._calls.values()),
            prefill_tokens=sum(call.prefill for call in self._calls.values()),
            num_running=self.stats.num_running,
            num_waiting=self.stats.num_waiting,
            stalled_s=time.monotonic() - self._progress_s,
        )

    @property
    def role(self) -> str:
        """Role of the group: the part of requests that the group computes."""
        return self._stats.role

    @property
    def stats(self) -> EngineStats:
        """Load of the engine, as last sent by the leader."""
        return self._stats.engine

    async def connect(self, timeout_s: float) -> None:
        """Start the link and wait until the link is up.

        Raises:
            Unavailable: the link is not up after `timeout_s` seconds; the client keeps trying.
        """
        self.start()
        try:
            async with asyncio.timeout(timeout_s):
                await self._up_event.wait()
        except TimeoutError:
            raise Unavailable(
                f"leader at {self.address} not reached in {timeout_s:g} s: {self._cause}"
            ) from None

    def start(self) -> None:
        """Start to connect, and keep the link up."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_up())

    async def close(self) -> None:
        """Close the link; requests in flight end with `Unavailable`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._set_state(False, "the gateway has removed the group")

    def generate(
        self, request: EngineRequest, num_cached: int = 0, peer: tuple[str, str] | None = None
    ) -> Call:
        """Run a request; closing the call early cancels the request.

        Iteration raises `InvalidRequest` or `Overloaded` when the engine refuses the request, and
        `Unavailable` when the leader is lost or draining; the text is the cause.

        Args:
            request: the request.
            num_cached: expected number of cached prompt tokens in the group.
            peer: address and token of a leader whose group has more cached tokens.

        Raises:
            Unavailable: the link is not connected.
        """
        if not self.connected:
            raise Unavailable(f"leader at {self.address}: {self.cause}")
        handle = next(self._handles)
        call = Call(request, num_cached, partial(self._ended, handle))
        self._calls[handle] = call
        self._request_ids[handle] = request.request_id
        self._handle_of[request.request_id] = handle
        self._send(frames.Submit.of(handle, request, peer))
        return call

    def _ended(self, handle: int, call: Call) -> None:
        """Forget a call whose reader has left; cancels an unfinished request."""
        if self._calls.pop(handle, None) is None:
            return
        self._handle_of.pop(self._request_ids.pop(handle), None)
        if call.running and call.error is None:
            self._send(frames.Cancel(handle))

    def cancel(self, request_id: str) -> None:
        """Stop a request; the call ends with a "cancelled" output."""
        handle = self._handle_of.get(request_id)
        if handle is not None:
            self._send(frames.Cancel(handle))
            call = self._calls[handle]
            for index in sorted(call.unfinished):
                call.put(
                    SequenceOutput(request_id=request_id, index=index, finish_reason="cancelled")
                )
            call.wake()

    def release(self, tenant: str, session: str) -> None:
        """Let the group evict the blocks of a tenant's session like others."""
        if self._up:
            self._send(frames.Release(tenant, session))

    def _send(self, message: frames.GatewayMessage) -> None:
        if self._connection is not None:
            self._connection.write(wire.encode([message]))

    async def _keep_up(self) -> None:
        pause = BACKOFF_S[0]
        while True:
            try:
                cause = await self._run()
            except (OSError, ssl.SSLError, TimeoutError) as error:
                cause = str(error) or "the leader does not answer"
            except Exception as error:
                log.exception("link to %s failed", self.address)
                cause = f"{type(error).__name__}: {error}"
            if self._up:
                log.warning("link to leader at %s lost: %s", self.address, cause)
                pause = BACKOFF_S[0]
            self._set_state(False, cause)
            # Random pauses keep all gateways from connecting to a restarted leader at once.
            await asyncio.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 2, BACKOFF_S[1])

    async def _run(self) -> str:
        """Run a connection from the greeting to its end; gives the cause of the end."""
        loop = asyncio.get_running_loop()
        closed: asyncio.Future[str] = loop.create_future()
        self._closed = closed
        connection = FramedConnection(self._on_frame, self._on_closed)
        host, _, port = self.address.rpartition(":")
        name = None if self._tls is None else LINK_NAME
        async with asyncio.timeout(SILENCE_S):
            await loop.create_connection(
                lambda: connection,
                host.strip("[]"),
                int(port),
                ssl=self._tls,
                server_hostname=name,
            )
        self._connection, self._last_frame_s = connection, time.monotonic()
        connection.write(wire.encode(frames.TokenGreeting(self._token)))
        try:
            while (left_s := self._last_frame_s + SILENCE_S - time.monotonic()) > 0:
                done, _ = await asyncio.wait([closed], timeout=left_s)
                if done:
                    return closed.result()
            return f"the leader has been silent for {SILENCE_S:g} s"
        finally:
            self._connection = None
            connection.abort("")

    def _on_closed(self, cause: str) -> None:
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(cause or "the leader closed the link")

    def _on_frame(self, frame: bytes) -> None:
        """Handle a frame from the leader."""
        self._last_frame_s = time.monotonic()
        try:
            message = wire.decode(frame, frames.LeaderMessage)
            if isinstance(message, frames.Step):
                self._on_step(message)
            elif isinstance(message, frames.Stats):
                self._on_stats(message)
            elif isinstance(message, frames.KvChanges):
                self._on_kv(message.batch)
            elif isinstance(message, frames.KvBlocks):
                self._on_kv(message.snapshot)
            elif isinstance(message, frames.Adapters):
                self._card = replace(self.card, adapters=message.adapters)
            elif isinstance(message, frames.Weights):
                self._set_card(
                    replace(self.card, digest=message.digest, cache_root=message.cache_root)
                )
            elif isinstance(message, frames.Refused):
                self._on_refused(message)
            elif isinstance(message, frames.Hello):
                self._on_hello(message)
            elif isinstance(message, frames.Bye):
                self._on_closed(message.cause)
        except ArrieroError as error:
            self._on_closed(str(error))
        except Exception as error:
            log.exception("leader at %s: unreadable frame", self.address)
            self._on_closed(f"{type(error).__name__}: {error}")

    def _on_hello(self, hello: frames.Hello) -> None:
        card = hello.read()
        if self._group_id not in (None, card.group):
            raise Unavailable(f"another group, {card.group}, answers at this address")
        self._set_card(card)
        self._set_state(True, "")

    def _set_card(self, card: ModelCard) -> None:
        self._card, self._weights = card, card.compat_key

    def _on_stats(self, stats: frames.Stats) -> None:
        was, before = self.connected, self._stats
        self._stats, engine = stats, stats.engine
        is_idle = not (engine.num_running or engine.num_waiting)
        if is_idle or engine.holding or before is _NO_STATS or engine.steps != before.engine.steps:
            self._progress_s = time.monotonic()
        if was != self.connected and self._on_change is not None:
            self._on_change()

    def _on_step(self, step: frames.Step) -> None:
        calls = []
        for handle, output in step.outputs(self._request_ids):
            call = self._calls[handle]
            output.weights = self._weights
            call.put(output)
            calls.append(call)
        for call in calls:
            call.wake()

    def _on_refused(self, refused: frames.Refused) -> None:
        call = self._calls.get(refused.handle)
        if call is not None:
            call.fail(refused.error())

    def _set_state(self, up: bool, cause: str) -> None:
        """Record that the link is up or down; calls in flight fail when the link is down."""
        changed = up != self._up
        self._up, self._cause = up, cause
        if not up:
            self._stats = _NO_STATS
            for call in self._calls.values():
                call.fail(Unavailable(f"the group's leader at {self.address} was lost: {cause}"))
        (self._up_event.set if up else self._up_event.clear)()
        if changed and self._on_change is not None:
            self._on_change()
