"""The server of a leader for the links of all gateways.

Submits the requests of gateways to the engine, and sends the outputs of each step back, one frame
per step and gateway. The end of a connection cancels the gateway's requests. Knows frames and the
three methods of an engine; knows nothing of text or of the engine's work.
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
from arriero.router.link.framing import FRAME_BYTES
from arriero.router.link.gateway_link import GatewayLink
from arriero.router.link.group_span import GroupSpan
from arriero.router.link.leader_rpc import HAND_OVER_TIMEOUT_S, PEER_TIMEOUT_S, PeerGroups
from arriero.router.observability.tracing import Tracing
from arriero.router.roles import Role
from arriero.router.text.model_card import ModelCard
from arriero.shards.engine.types import EngineRequest, EngineStats, SequenceOutput
from arriero.shards.errors import ArrieroError, InvalidRequest, Unavailable

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
    """The engine of a leader; the three methods return at once and may be called in any thread."""

    def submit(self, request: EngineRequest) -> None:
        """Add a request, or raise `InvalidRequest`, `Overloaded` or `Unavailable`."""

    def cancel(self, request_id: str) -> None:
        """Stop a request; does nothing when it is not running."""

    def stats(self) -> EngineStats:
        """The current load."""


KvAnswer = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Runs an action on the KV cache (name, arguments) for an operator or another leader."""


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
            link.send(["bye", "the group is stopping"])
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
            kind, token = frames.unpack(greeting)
        except Exception:  # no gateway sends such bytes
            link.connection.abort("the greeting is unreadable: not a gateway")
            return
        if kind not in ("token", "ask") or not hmac.compare_digest(
            str(token).encode(), self._token.encode()
        ):
            link.send(["bye", "the gateway sent a wrong token"])
            link.connection.close()
            return
        link.connection.limit = FRAME_BYTES
        link.calls_actions = kind == "ask"
        if link.calls_actions:
            return
        self._links.add(link)
        link.send(["hello", frames.VERSION, self._card.to_wire()])
        link.send(self._stats_frame())
        if self._journal is not None:
            link.send(["kv_all", *self._journal.snapshot().to_wire()])

    def _on_frame(self, link: GatewayLink, frame: bytes) -> None:
        """Handle a frame of an authenticated peer."""
        try:
            if link.calls_actions:
                self._run_in_background(self._answer(link, *frames.unpack(frame)))
                return
            for message in frames.unpack(frame):
                if message[0] == "submit":
                    self._submit(link, message)
                elif message[0] == "cancel":
                    self._cancel(link, message[1])
                else:
                    raise ValueError(f"unknown message kind {message[0]!r}")
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

    def _submit(self, link: GatewayLink, message: list[Any]) -> None:
        handle: int = message[1]
        try:
            request = frames.read_submit(message)
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
        peer = frames.read_peer(message)
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
        try:
            self._engine.submit(request)
        except Exception as error:
            link.drop(handle)
            self._forget(request.request_id)
            link.refuse(handle, error)

    async def _answer(self, link: GatewayLink, action: str, arguments: dict[str, Any]) -> None:
        """Run an action on the KV cache, or change the role."""
        try:
            if action == "role":
                self.role = roles.read(arguments.get("role"))
                for gateway in self._links:
                    gateway.send(self._stats_frame())
                link.send(["answer", {"role": self.role}])
                return
            if self._kv is None:
                raise InvalidRequest("action", "this leader has no actions on its KV cache")
            link.send(["answer", await self._kv(action, arguments)])
        except Exception as error:
            if not isinstance(error, ArrieroError):
                log.exception("action %r on the KV cache failed", action)
            link.send(["refused", str(error) or type(error).__name__])

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
                frame = ["kv", *batch.to_wire()]
                for link in self._links:
                    link.send(frame)

    async def _send_stats(self) -> None:
        """Send the load at intervals; gateways also use the frames as a sign of life."""
        while True:
            await asyncio.sleep(STATS_INTERVAL_S)
            frame = self._stats_frame()
            for link in self._links:
                link.send(frame)

    def _stats_frame(self) -> list[Any]:
        more = {"draining": self._draining, "role": self.role}
        return ["stats", asdict(self._engine.stats()) | more]
