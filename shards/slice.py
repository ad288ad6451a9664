"""A slice's loop: join the group, load, then plan after plan until told to stop.

One ZeroMQ socket to the leader carries everything: hello, join, progress, ready, plans, results,
errors. Runs in any process: a Ray actor's thread, a spawned child, torchrun.

Messages are two frames: a one-byte kind and a body. To the leader: H hello, L loading, R ready,
T result, V moved, E error (bodies are msgpack). From the leader: J join (rendezvous), P plan,
M moves of KV blocks, S stop. What came of moves is sent by the thread that makes them, through a
socket of its own.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import msgpack
import zmq

from arriero.shards.group import GroupConfig

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from arriero.shards.kv.mover import Mover
    from arriero.shards.kv.moves import Moved
    from arriero.shards.runner import Pending, Runner

PROGRESS_PERIOD_S = 0.1
LEADER_CHECK_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """What a slice needs to find its leader. Keep it secret: it holds the group's keys.

    Attributes:
        address: of the leader's socket, ipc or TCP.
        config: of the group, resolved.
        server_key, public_key, secret_key: CURVE keys (Z85), None on ipc.
    """

    address: str
    config: GroupConfig
    server_key: bytes | None = None
    public_key: bytes | None = None
    secret_key: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceReport:
    """What a slice holds once it is loaded. Bytes are those really allocated."""

    rank: int
    host: str
    pid: int
    kernels: str
    threads: int
    weights_bytes: int
    kv_bytes: int
    load_s: float


class LeaderLost(Exception):
    """The leader is gone; a slice has nothing to live for."""


def run_slice(
    rank: int,
    ticket: Ticket,
    *,
    host: str = "127.0.0.1",
    leader_alive: Callable[[], bool] = lambda: True,
) -> None:
    """Serve as `rank` of the ticket's group; returns when the leader says stop or is gone.

    A failure is reported to the leader, then raised.

    Args:
        rank: stage * tp + tp rank.
        ticket: from the leader's executor.
        host: this node's address, for the ranks' own sockets.
        leader_alive: asked now and then while no plan comes.
    """
    link = _Link(rank, ticket, leader_alive)
    phase = "start"
    try:
        # torch takes seconds to import: say hello first, so that the leader sees us start
        store_socket = _listen(host) if rank == 0 and ticket.config.world_size > 1 else None
        port = store_socket.getsockname()[1] if store_socket else 0
        link.send(b"H", {"host": host, "port": port, "pid": os.getpid()})

        from arriero.shards.runner import runner_for

        phase = "load"
        runner = runner_for(ticket.config, rank, progress=link.progress)
        phase = "join"
        where = link.receive(b"J")
        if where is None:
            return
        if ticket.config.world_size > 1:
            store = _rendezvous(msgpack.unpackb(where), ticket.config, rank, store_socket)
            runner.mesh.join(store, host)
        report = SliceReport(
            rank=rank,
            host=host,
            pid=os.getpid(),
            kernels=runner.kernels,
            threads=ticket.config.threads or 1,
            weights_bytes=runner.weights_nbytes,
            kv_bytes=runner.kv_nbytes,
            load_s=runner.load_s,
        )
        link.send(b"R", asdict(report))
        phase = "step"
        mover = runner.open_tiers(link.open_second().send)
        try:
            _serve(runner, link, mover)
        finally:
            if mover is not None:
                mover.close()
        runner.mesh.leave()
    except LeaderLost:
        return
    except Exception as error:
        last = traceback.format_exc(limit=-3)
        link.send(b"E", {"phase": phase, "error": f"{type(error).__name__}: {error}", "at": last})
        raise
    finally:
        link.close()


def _serve(runner: Runner, link: _Link, mover: Mover | None) -> None:
    """The loop: receive, launch, reply; a plan that has come is launched before a result is due."""
    from arriero.shards.kv.moves import Moves
    from arriero.shards.plan import StepPlan

    due: deque[Pending] = deque()
    while True:
        while due and (due[0].done or not link.waiting()):
            link.send_bytes(b"T", due.popleft().wait().to_bytes())
        message = link.receive_any((b"P", b"M"))
        if message is None:
            return
        kind, body = message
        if kind == b"M":
            assert mover is not None, "moves came to a slice without tiers"
            mover.submit(Moves.from_bytes(body))
            continue
        pending = runner.launch(StepPlan.from_bytes(body))
        if pending is not None:
            due.append(pending)


def _listen(host: str) -> socket.socket:
    """A listening socket for the ranks' rendezvous, on a port of the system's choice."""
    return socket.create_server((host, 0))


def _rendezvous(
    where: dict[str, Any], config: GroupConfig, rank: int, listening: socket.socket | None
) -> Store:
    """The store at which the ranks meet; rank 0 keeps it."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(
        where["host"],
        where["port"],
        config.world_size,
        is_master=rank == 0,
        master_listen_fd=listening.detach() if listening else None,
        wait_for_workers=False,
    )


class _Link:
    """The socket to the leader."""

    def __init__(self, rank: int, ticket: Ticket, leader_alive: Callable[[], bool]) -> None:
        self._alive = leader_alive
        self._context = zmq.Context()
        self._name, self._ticket = rank.to_bytes(4, "little"), ticket
        self._socket = _connect(self._context, self._name, ticket)
        self._socket.setsockopt(zmq.RCVTIMEO, int(LEADER_CHECK_S * 1000))
        self._last_progress = 0.0
        self._second: _MovedLink | None = None

    def open_second(self) -> _MovedLink:
        """A way for another thread to send; closed with the link, when that thread has ended."""
        self._second = _MovedLink(self._context, self._name, self._ticket)
        return self._second

    def send(self, kind: bytes, body: dict[str, object]) -> None:
        """Send a message whose body is a map."""
        self.send_bytes(kind, msgpack.packb(body))

    def send_bytes(self, kind: bytes, body: bytes) -> None:
        """Send a message."""
        self._socket.send_multipart([kind, body])

    def progress(self, done: int, total: int) -> None:
        """Tell how far loading is, now and then."""
        now = time.monotonic()
        if done == total or now - self._last_progress > PROGRESS_PERIOD_S:
            self._last_progress = now
            self.send(b"L", {"done": done, "total": total})

    def receive(self, kind: bytes) -> bytes | None:
        """Wait for a message of `kind`; None when told to stop. Raises as `receive_any`."""
        message = self.receive_any((kind,))
        return None if message is None else message[1]

    def receive_any(self, kinds: tuple[bytes, ...]) -> tuple[bytes, bytes] | None:
        """Wait for a message of one of `kinds`: (kind, body); None when told to stop.

        Raises:
            LeaderLost: nothing came and the leader is gone.
        """
        while True:
            try:
                got, body = self._socket.recv_multipart()
            except zmq.Again:
                if not self._alive():
                    raise LeaderLost from None
                continue
            if got == b"S":
                return None
            assert got in kinds, f"message {got!r} where one of {kinds!r} is due"
            return got, body

    def waiting(self) -> bool:
        """Whether a message is here to be received."""
        return bool(self._socket.poll(0))

    def close(self) -> None:
        """Give the sockets back, once what was sent is out."""
        self._socket.close()
        if self._second is not None:
            self._second.close()
        self._context.term()


class _MovedLink:
    """A socket to the leader for what came of moves; one thread sends."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], name: bytes, ticket: Ticket) -> None:
        self._context, self._name, self._ticket = context, name, ticket
        self._socket: zmq.Socket[bytes] | None = None

    def send(self, moved: Moved) -> None:
        """Send; the first call decides the thread."""
        if self._socket is None:
            self._socket = _connect(self._context, self._name + b"moved", self._ticket)
        self._socket.send_multipart([b"V", moved.to_bytes()])

    def close(self) -> None:
        """Give the socket back; the thread that sent has ended."""
        if self._socket is not None:
            self._socket.close()


def _connect(
    context: zmq.Context[zmq.Socket[bytes]], name: bytes, ticket: Ticket
) -> zmq.Socket[bytes]:
    """A socket to the leader, which knows it by `name`."""
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.IDENTITY, name)
    made.setsockopt(zmq.SNDHWM, 0)
    made.setsockopt(zmq.RCVHWM, 0)
    made.setsockopt(zmq.LINGER, 1000)
    if ticket.server_key is not None:
        made.curve_serverkey = ticket.server_key
        made.curve_publickey = ticket.public_key
        made.curve_secretkey = ticket.secret_key
    made.connect(ticket.address)
    return made
