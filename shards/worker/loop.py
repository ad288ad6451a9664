"""A slice's loop: join the group, load, then plan after plan until told to stop.

One ZeroMQ socket to the leader carries everything: hello, join, progress, ready, plans, results,
errors; pulses go beside it (see `pulse`). Runs in any process: a Ray actor's thread, a spawned
child, torchrun.

Messages are two frames: a `MessageKind` and a body, msgpack or the bytes of a plan or result.
"""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgpack
import zmq

from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import CollectiveFailed
from arriero.shards.protocol.messages import MessageKind
from arriero.shards.protocol.rendezvous import LeaderEndpoint, SliceReport
from arriero.shards.worker.heartbeat import Activity, HeartbeatSender

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from arriero.shards.kv.transfer_worker import TransferWorkers
    from arriero.shards.kv.transfers import TransferResult
    from arriero.shards.worker.runner import Pending, Runner

PROGRESS_PERIOD_S = 0.1
LEADER_CHECK_S = 1.0
LOADS_PERIOD_S = 0.5


class LeaderLost(Exception):
    """The leader is gone; a slice has nothing to live for."""


def run_slice(
    rank: int,
    ticket: LeaderEndpoint,
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
    activity = Activity()
    pulse = HeartbeatSender(rank, ticket, activity)
    try:
        # torch takes seconds to import: say hello first, so that the leader sees us start
        store_socket = _listen(host) if rank == 0 and ticket.config.world_size > 1 else None
        port = store_socket.getsockname()[1] if store_socket else 0
        link.send(MessageKind.HELLO, {"host": host, "port": port, "pid": os.getpid()})

        from arriero.shards.worker.select import runner_for

        activity.phase = "load"
        runner = runner_for(ticket.config, rank, progress=link.progress)
        activity.phase = "join"
        where = link.receive(MessageKind.JOIN)
        if where is None:
            return
        if ticket.config.world_size > 1:
            store = _rendezvous(msgpack.unpackb(where), ticket.config, rank, store_socket)
            runner.mesh.join(store, host)
        activity.phase = "warm up"
        runner.warm_up()
        activity.runner = runner
        loaded = SliceReport(
            rank=rank,
            host=host,
            pid=os.getpid(),
            kernels=runner.kernels,
            threads=ticket.config.threads or 1,
            weights_bytes=runner.weights_nbytes,
            kv_bytes=runner.kv_nbytes,
            load_s=runner.load_s,
        )
        link.send(MessageKind.READY, asdict(loaded))
        gc.freeze()  # what is loaded stays: full collections need not walk it
        movers = runner.open_tiers(link.moved, host)
        try:
            _serve(runner, link, activity, movers)
        finally:
            movers.close()
        runner.mesh.leave()
    except LeaderLost:
        return
    except Exception as error:
        report = {
            "phase": activity.now().phase,
            "step": activity.now().step,
            "collective": error.collective if isinstance(error, CollectiveFailed) else "",
            "error": f"{type(error).__name__}: {error}",
            "at": traceback.format_exc(limit=-3),
            "log": pulse.tail(),
        }
        link.send(MessageKind.ERROR, report)
        raise
    finally:
        pulse.close()
        link.close()


def _serve(runner: Runner, link: _Link, activity: Activity, movers: TransferWorkers) -> None:
    """The loop: receive, launch, reply; a plan that has come is launched before a result is due."""
    from arriero.shards.kv.transfers import TransferBatch
    from arriero.shards.protocol.step_plan import StepPlan

    due: deque[Pending] = deque()
    told = time.monotonic()
    while True:
        if time.monotonic() - told >= LOADS_PERIOD_S:
            told = time.monotonic()
            if loads := runner.take_loads():
                counts = [one.tolist() for one in loads.values()]
                link.send(MessageKind.EXPERT_LOADS, {"layers": list(loads), "loads": counts})
        while due and (due[0].done or not link.waiting()):
            if due[0].done:
                result = due.popleft().wait()
            else:
                with runner.mesh.watchdog.watch("the device's result"):
                    result = due.popleft().wait()
            link.send_bytes(MessageKind.RESULT, result.to_bytes())
        activity.idle = True
        message = link.receive_any(MessageKind.PLAN, MessageKind.TRANSFER)
        activity.idle = False
        if message is None:
            return
        kind, body = message
        if kind is MessageKind.TRANSFER:
            movers.submit(TransferBatch.from_bytes(body))
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

    def __init__(self, rank: int, ticket: LeaderEndpoint, leader_alive: Callable[[], bool]) -> None:
        self._alive = leader_alive
        self._context = zmq.Context()
        self._name, self._ticket = rank.to_bytes(4, "little"), ticket
        self._socket = self._connect(self._name)
        self._socket.setsockopt(zmq.RCVTIMEO, int(LEADER_CHECK_S * 1000))
        self._last_progress = 0.0
        self._moved_socket: zmq.Socket[bytes] | None = None
        self._moved_lock = threading.Lock()

    def _connect(self, name: bytes) -> zmq.Socket[bytes]:
        """A socket to the leader, which knows it by `name`."""
        made = self._context.socket(zmq.DEALER)
        made.setsockopt(zmq.IDENTITY, name)
        made.setsockopt(zmq.SNDHWM, 0)
        made.setsockopt(zmq.RCVHWM, 0)
        made.setsockopt(zmq.LINGER, 1000)
        self._ticket.secure(made)
        made.connect(self._ticket.address)
        return made

    def send(self, kind: MessageKind, body: dict[str, object]) -> None:
        """Send a message whose body is a map."""
        self.send_bytes(kind, msgpack.packb(body))

    def send_bytes(self, kind: MessageKind, body: bytes) -> None:
        """Send a message."""
        self._socket.send_multipart([kind.value, body])

    def moved(self, moved: TransferResult) -> None:
        """Tell what came of copies of blocks; from any thread, until those that copy have ended."""
        with self._moved_lock:  # the main thread waits in its own socket, so this is another
            if self._moved_socket is None:
                self._moved_socket = self._connect(self._name + b"moved")
            self._moved_socket.send_multipart([MessageKind.TRANSFER_RESULT.value, moved.to_bytes()])

    def progress(self, done: int, total: int) -> None:
        """Tell how far loading is, now and then."""
        now = time.monotonic()
        if done == total or now - self._last_progress > PROGRESS_PERIOD_S:
            self._last_progress = now
            self.send(MessageKind.LOADING, {"done": done, "total": total})

    def receive(self, kind: MessageKind) -> bytes | None:
        """Body of the next message, which is of `kind`; None when told to stop.

        Raises:
            LeaderLost: nothing came and the leader is gone.
        """
        message = self.receive_any(kind)
        return None if message is None else message[1]

    def receive_any(self, *kinds: MessageKind) -> tuple[MessageKind, bytes] | None:
        """Kind and body of the next message, which is of one of `kinds`; as `receive`."""
        while True:
            try:
                head, body = self._socket.recv_multipart()
            except zmq.Again:
                if not self._alive():
                    raise LeaderLost from None
                continue
            kind = MessageKind(head)
            if kind is MessageKind.STOP:
                return None
            assert kind in kinds, f"message {kind.name}, expected {[kind.name for kind in kinds]}"
            return kind, body

    def waiting(self) -> bool:
        """Whether a message is here to be received."""
        return bool(self._socket.poll(0))

    def close(self) -> None:
        """Give the socket back, once what was sent is out."""
        self._socket.close()
        if self._moved_socket is not None:
            self._moved_socket.close()
        self._context.term()
