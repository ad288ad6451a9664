"""The server of a leader for the links of all gateways.

Submits the requests of gateways to the engine, and sends the outputs of each step back, one frame
per step and gateway. The end of a connection cancels the gateway's requests. Knows frames and the
methods of an engine; knows nothing of text or of the engine's work.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Protocol

from arriero.router import roles
from arriero.router.directory.journal import Journal
from arriero.router.directory.prefixes import CacheRoot
from arriero.router.link import messages as frames
from arriero.router.link.framing import FRAME_BYTES
from arriero.router.link.gateway_link import GatewayLink
from arriero.router.link.group_span import GroupSpan
from arriero.router.link.leader_rpc import (
    HAND_OVER_TIMEOUT_S,
    PEER_TIMEOUT_S,
    GroupRole,
    PeerGroups,
)
from arriero.router.observability.tracing import Tracing
from arriero.router.roles import Role
from arriero.router.text.model_card import ModelCard, ServedAdapter
from arriero.shards.engine.stats import EngineStats
from arriero.shards.engine.types import EngineRequest, SequenceOutput
from arriero.shards.errors import ArrieroError, InvalidRequest, Unavailable, WireError
from arriero.shards.protocol import wire

log = logging.getLogger(__name__)

GREETING_S = 5.0
"""Seconds after which a connection without a greeting is closed."""
STATS_INTERVAL_S = 0.5
CLOSE_S = 1.0
"""Largest number of seconds to wait until gateways have read the last frames."""
KV_INTERVAL_S = 0.05
"""Seconds between two batches of changed KV blocks."""
KV_QUIET_S = 0.5
"""The same after `KV_CALM_S` without a change, until the next output."""
KV_CALM_S = 5.0


class Engine(Protocol):
    """The engine of a leader; its methods return at once and may be called in any thread."""

    def submit(self, request: EngineRequest) -> None:
        """Add a request, or raise `InvalidRequest`, `Overloaded` or `Unavailable`."""

    def cancel(self, request_id: str) -> None:
        """Stop a request; does nothing when it is not running."""

    def release(self, tenant: str, session: str) -> None:
        """Retain the blocks of a tenant's session no longer."""

    def stats(self) -> EngineStats:
        """The current load."""


KvAnswer = Callable[[str, memoryview], Awaitable[object]]
"""Runs an action on the KV cache for an operator or another leader, from its name and the bytes of
its arguments; the answer may have any type of `wire`."""


class LinkServer:
    """Serves the links of a leader, and the actions on its KV cache (see `leader_rpc`).

    Args:
        engine: runs the requests.
        card: model card, part of the hello.
        address: host and port; port 0 stands for any free port.
        token: secret that a gateway must send; "" accepts every gateway.
        tls: TLS of the listener; None for connections in the clear.
        tracing: makes a span for each request with a `traceparent`; None for no spans.
        kv: runs actions on the KV cache; None refuses all actions.
        journal: changes of KV blocks for the routing of gateways; None sends no changes.
        peers: other leaders to copy blocks from; None for no copies.

    Attributes:
        role: part of requests that the group computes, sent with the load; may be changed at any
            time.
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
        self._spans: dict[str, GroupSpan] = {}
        self._token = token
        self._tls = tls
        self._engine = engine
        self._card = card
        self._address = address
        self._links: set[GatewayLink] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._owners: dict[str, tuple[GatewayLink, int]] = {}
        self._draining = False
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._idle = asyncio.Event()
        self._has_outputs = asyncio.Event()

    async def start(self) -> str:
        """Listen; gives the bound address.

        Raises:
            OSError: the address cannot be bound.
        """
        self._loop = asyncio.get_running_loop()
        host, _, port = self._address.rpartition(":")
        try:
            self._server = await self._loop.create_server(
                lambda: self._new_link().connection, host.strip("[]"), int(port), ssl=self._tls
            )
        except OSError as error:
            raise OSError(f"cannot listen on {self._address}: {error.strerror}") from error
        self._tasks = [asyncio.create_task(self._send_stats())]
        if self._journal is not None:
            self._tasks.append(asyncio.create_task(self._send_blocks(self._journal)))
        return f"{host}:{self._server.sockets[0].getsockname()[1]}"

    def set_adapters(self, adapters: tuple[ServedAdapter, ...]) -> None:
        """Serve these adapters from now on, and tell all gateways."""
        self._card = replace(self._card, adapters=adapters)
        for link in self._links:
            link.send(frames.Adapters(adapters))

    def set_weights(self, digest: str, cache_root: bytes) -> None:
        """Serve these weights from now on, and tell all gateways, after all outputs so far.

        Called from the engine's thread, as `on_outputs`.
        """
        assert self._loop is not None, "set_weights before start"
        self._loop.call_soon_threadsafe(self._set_weights, digest, cache_root)

    def _set_weights(self, digest: str, cache_root: bytes) -> None:
        self._card = replace(self._card, digest=digest, cache_root=cache_root)
        for link in self._links:
            link.flush()
            link.send(frames.Weights(digest, cache_root))

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running requests finish for `grace_s` seconds, then close."""
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
            link.send(frames.Bye("the group is stopping"))
            link.connection.close()
        for _ in range(int(CLOSE_S / 0.01)):
            if not self._links:
                break
            await asyncio.sleep(0.01)

    def on_outputs(self, outputs: Sequence[SequenceOutput]) -> None:
        """Send the outputs of a step; called from the engine's thread."""
        assert self._loop is not None, "on_outputs before start"
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:  # the loop is closed: no gateway is left
            log.debug("outputs after the loop closed")

    def _deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        links = set()
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue  # cancelled while the step ran
            link, handle = owner
            link.outputs.append((handle, output))
            links.add(link)
            if self._spans and (span := self._spans.get(output.request_id)) is not None:
                span.add(output)
            if output.finish_reason is not None and link.sample_done(handle):
                self._forget(output.request_id)
        for link in links:
            link.flush()
        if links:
            self._has_outputs.set()

    def _forget(self, request_id: str) -> None:
        self._owners.pop(request_id, None)
        if (span := self._spans.pop(request_id, None)) is not None:
            span.end(self._engine.stats())
        if not self._owners:
            self._idle.set()

    def _new_link(self) -> GatewayLink:
        return GatewayLink(self._on_greeting, self._on_frame, self._on_closed, GREETING_S)

    def _on_greeting(self, link: GatewayLink, greeting: bytes) -> None:
        """Check the token of a new connection, and send the hello to a gateway.

        A peer that greets with "ask" is no gateway: the peer gets no hello and calls actions.
        """
        try:
            greeted = wire.decode(greeting, frames.Greeting)
        except WireError:  # no gateway sends such bytes
            link.connection.abort("the greeting is unreadable: not a gateway")
            return
        assert isinstance(greeted, frames.TokenGreeting | frames.AskGreeting), "a greeting"
        if not hmac.compare_digest(greeted.token.encode(), self._token.encode()):
            link.send(frames.Bye("the gateway sent a wrong token"))
            link.connection.close()
            return
        link.connection.limit = FRAME_BYTES
        link.calls_actions = isinstance(greeted, frames.AskGreeting)
        if link.calls_actions:
            return
        self._links.add(link)
        link.send(frames.Hello.of(self._card))
        link.send(self._stats())
        if self._journal is not None:
            link.send(frames.KvBlocks(self._journal.snapshot()))

    def _on_frame(self, link: GatewayLink, frame: bytes) -> None:
        """Handle a frame of an authenticated peer."""
        try:
            if link.calls_actions:
                self._run_in_background(self._answer(link, wire.decode(frame, frames.Action)))
                return
            for message in wire.decode(frame, list[frames.GatewayMessage]):
                if isinstance(message, frames.Submit):
                    self._submit(link, message)
                elif isinstance(message, frames.Release):
                    self._engine.release(message.tenant, message.session)
                else:
                    self._cancel(link, message.handle)
        except Exception as error:
            link.connection.abort(f"unreadable frame: {type(error).__name__}: {error}")

    def _cancel(self, link: GatewayLink, handle: int) -> None:
        request_id = link.drop(handle)
        if request_id is not None:
            self._forget(request_id)
            self._engine.cancel(request_id)

    def _on_closed(self, link: GatewayLink, cause: str) -> None:
        """Cancel the requests of a closed connection."""
        if cause:
            log.warning("link with gateway %s lost: %s", link.connection.peer, cause)
        self._links.discard(link)
        for request_id in link.requests():
            self._forget(request_id)
            self._engine.cancel(request_id)

    def _submit(self, link: GatewayLink, message: frames.Submit) -> None:
        handle, peer = message.handle, message.peer
        try:
            request = message.read()
            if self._draining:
                raise Unavailable("the group is draining")
            if request.request_id in self._owners:
                raise InvalidRequest(
                    "request_id",
                    f"`request_id`={request.request_id!r} is already running; use a new id",
                )
            # Before `Engine.submit`, whose thread may send outputs at once.
            self._owners[request.request_id] = (link, handle)
            link.add_request(handle, request.request_id, request.params.n)
        except Exception as error:
            link.refuse(handle, error)
            return
        if self._tracing is not None and request.trace:
            self._spans[request.request_id] = GroupSpan(self._tracing, request, self._card.group)
        if peer is None or self._peers is None:
            self._submit_to_engine(link, handle, request)
        else:
            self._run_in_background(self._with_peer(self._peers, peer, link, handle, request))

    async def _with_peer(
        self,
        peers: PeerGroups,
        peer: tuple[str, str],
        link: GatewayLink,
        handle: int,
        request: EngineRequest,
    ) -> None:
        """Ask a peer for its blocks of the prompt, then submit the request."""
        root = CacheRoot.of(self._card, request)
        if root is not None:
            timeout_s = HAND_OVER_TIMEOUT_S if request.resumed else PEER_TIMEOUT_S
            tokens = request.prompt + request.resumed
            blocks = await peers.blocks(peer, root, tokens, timeout_s)
            request = replace(request, peer=blocks)
        if self._owners.get(request.request_id) == (link, handle):  # not cancelled meanwhile
            self._submit_to_engine(link, handle, request)

    def _submit_to_engine(self, link: GatewayLink, handle: int, request: EngineRequest) -> None:
        log.debug(
            "%d prompt tokens, %d samples, %d tokens to go on from",
            len(request.prompt), request.params.n, len(request.resumed),
            extra={"request_id": request.request_id},
        )  # fmt: skip
        try:
            self._engine.submit(request)
        except Exception as error:
            link.drop(handle)
            self._forget(request.request_id)
            link.refuse(handle, error)

    async def _answer(self, link: GatewayLink, action: frames.Action) -> None:
        """Run an action on the KV cache, or change the role."""
        arguments = memoryview(action.arguments)
        try:
            if action.name == "role":
                answer: object = self._change_role(wire.decode(arguments, GroupRole))
            elif self._kv is None:
                raise InvalidRequest("action", "this leader has no actions on its KV cache")
            else:
                answer = await self._kv(action.name, arguments)
            link.send(frames.ActionAnswer.of(answer))
        except Exception as error:
            if not isinstance(error, ArrieroError):
                log.exception("action %r on the KV cache failed", action.name)
            link.send(frames.ActionRefused(str(error) or type(error).__name__))

    def _change_role(self, wanted: GroupRole) -> GroupRole:
        """Change the role of the group, and send it to all gateways."""
        self.role = roles.read(wanted.role)
        for gateway in self._links:
            gateway.send(self._stats())
        return GroupRole(role=self.role)

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _send_blocks(self, journal: Journal) -> None:
        """Send the changes of KV blocks to all gateways."""
        calm_s = 0.0
        while True:
            self._has_outputs.clear()
            if calm_s < KV_CALM_S:
                await asyncio.sleep(KV_INTERVAL_S)
            else:  # an idle leader wakes up less often
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._has_outputs.wait(), KV_QUIET_S)
            batch = journal.next_batch()
            calm_s += KV_INTERVAL_S
            if batch is not None or self._has_outputs.is_set():
                calm_s = 0.0
            if batch is not None:
                message = frames.KvChanges(batch)
                for link in self._links:
                    link.send(message)

    async def _send_stats(self) -> None:
        """Send the load at intervals; gateways also use the frames as a sign of life."""
        while True:
            await asyncio.sleep(STATS_INTERVAL_S)
            stats = self._stats()
            for link in self._links:
                link.send(stats)

    def _stats(self) -> frames.Stats:
        return frames.Stats(self._engine.stats(), self._draining, self.role)
