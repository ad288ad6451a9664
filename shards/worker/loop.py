"""The loop of a slice: load, join the group, then run plans until the leader sends a stop.

One ZeroMQ socket to the leader carries all messages: hello, join, progress, ready, plans, results,
errors; heartbeats have a socket of their own (see `heartbeat`). Runs in any process: a thread of a
Ray actor, a spawned child, torchrun. Knows sockets and messages; knows nothing of the computation.

Messages are two frames: a `MessageKind` and a body.
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
from typing import TYPE_CHECKING

import zmq

from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import CollectiveFailed
from arriero.shards.protocol import wire
from arriero.shards.protocol.messages import (
    LoadedBytes,
    MessageKind,
    RendezvousAddress,
    SliceFailure,
    SliceHello,
)
from arriero.shards.protocol.rendezvous import LeaderEndpoint, SliceReport
from arriero.shards.worker.heartbeat import Activity, HeartbeatSender

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from arriero.shards.kv.transfer_worker import TransferWorkers
    from arriero.shards.kv.transfers import TransferResult
    from arriero.shards.protocol.adapters import AdapterResult
    from arriero.shards.protocol.weights import WeightsResult
    from arriero.shards.worker.runner import Runner
from arriero.shards.worker.step_results import Pending

PROGRESS_PERIOD_S = 0.1
LEADER_CHECK_S = 1.0
_IPC = "ipc://"
LOADS_PERIOD_S = 0.5


class LeaderLost(Exception):
    """The leader is gone, and the slice must end."""


def run_slice(
    rank: int,
    endpoint: LeaderEndpoint,
    *,
    host: str = "127.0.0.1",
    leader_alive: Callable[[], bool] = lambda: True,
) -> None:
    """Run a slice until the leader sends a stop or is gone.

    Reports a failure to the leader, then raises the failure.

    Args:
        rank: stage * tp + tp rank.
        endpoint: endpoint of the leader's executor, with the group's configuration.
        host: address of this node for the sockets of the ranks.
        leader_alive: called while no plan comes; False ends the slice.
    """
    link = _LeaderLink(rank, endpoint, leader_alive)
    activity = Activity()
    heartbeats = HeartbeatSender(rank, endpoint, activity)
    try:
        runner = _start(rank, endpoint, host, link, activity)
        if runner is None:
            return
        gc.freeze()  # loaded objects stay: full collections need not visit them
        transfer_workers = runner.open_tiers(link.send_transfer_result, host)
        if runner.adapter_store is not None:
            runner.adapter_store.start(link.send_adapter_result)
        runner.weight_checker.start(link.send_weights_result)
        try:
            _serve(runner, link, activity, transfer_workers)
        finally:
            transfer_workers.close()
        runner.close()
        runner.mesh.leave()
    except LeaderLost:
        return
    except Exception as error:
        failure = SliceFailure(
            phase=activity.now().phase,
            step=activity.now().step,
            collective=error.collective if isinstance(error, CollectiveFailed) else "",
            error=f"{type(error).__name__}: {error}",
            at=traceback.format_exc(limit=-3),
            log=heartbeats.tail(),
        )
        link.send(MessageKind.ERROR, failure)
        raise
    finally:
        heartbeats.close()
        link.close()


def _start(
    rank: int, endpoint: LeaderEndpoint, host: str, link: _LeaderLink, activity: Activity
) -> Runner | None:
    """Load the slice and join the group; gives the ready runner, or None after a stop."""
    config, store_file = endpoint.config, _store_file(endpoint)
    # the import of torch takes seconds: the hello comes first and shows the leader the start
    serves_store = rank == 0 and config.world_size > 1 and store_file is None
    store_socket = _listen(host) if serves_store else None
    port = store_socket.getsockname()[1] if store_socket else 0
    link.send(MessageKind.HELLO, SliceHello(host=host, port=port, pid=os.getpid()))

    from arriero.shards.worker.select import runner_for

    activity.phase = "load"
    runner = runner_for(config, rank, progress=link.progress)
    activity.phase = "join"
    address = link.receive(MessageKind.JOIN)
    if address is None:
        return None
    if config.world_size > 1:
        meeting = wire.decode(address, RendezvousAddress)
        store = (
            _rendezvous(meeting, config, rank, store_socket)
            if store_file is None
            else _shared_file(store_file, config)
        )
        runner.mesh.join(store, host)
    activity.phase = "warm up"
    runner.warm_up()
    activity.runner = runner
    report = SliceReport(
        rank=rank,
        host=host,
        pid=os.getpid(),
        kernels=runner.kernels,
        threads=config.threads or 1,
        weights_bytes=runner.weights_nbytes,
        kv_bytes=runner.kv_nbytes,
        load_s=runner.load_s,
    )
    link.send(MessageKind.READY, report)
    return runner


def _serve(
    runner: Runner, link: _LeaderLink, activity: Activity, transfer_workers: TransferWorkers
) -> None:
    """Receive, launch, reply; a received plan is launched before the wait for an earlier result."""
    from arriero.shards.kv.transfers import TransferBatch
    from arriero.shards.protocol.adapters import AdapterBatch
    from arriero.shards.protocol.step_plan import StepPlan
    from arriero.shards.protocol.weights import WeightsCommand
    from arriero.shards.worker.weight_commands import run_command

    launched: deque[Pending] = deque()
    loads_sent_s = time.monotonic()
    while True:
        if time.monotonic() - loads_sent_s >= LOADS_PERIOD_S:
            loads_sent_s = time.monotonic()
            if loads := runner.take_loads():
                link.send(MessageKind.EXPERT_LOADS, loads)
        while launched and (launched[0].done or not link.has_message()):
            if launched[0].done:
                result = launched.popleft().wait()
            else:
                with runner.mesh.watchdog.watch("the device's result"):
                    result = launched.popleft().wait()
            link.send(MessageKind.RESULT, result)
        activity.idle = True
        message = link.receive_any(
            MessageKind.PLAN, MessageKind.TRANSFER, MessageKind.ADAPTERS, MessageKind.WEIGHTS
        )
        if message is None:
            return
        kind, body = message
        if kind is MessageKind.WEIGHTS:  # may take minutes without progress, as the wait for work
            run_command(runner, wire.decode(body, WeightsCommand), link.send_weights_result)
            continue
        activity.idle = False
        if kind is MessageKind.TRANSFER:
            transfer_workers.submit(wire.decode(body, TransferBatch))
            continue
        if kind is MessageKind.ADAPTERS:
            assert runner.adapter_store is not None, "the leader knows the slots"
            runner.adapter_store.submit(wire.decode(body, AdapterBatch))
            continue
        pending = runner.launch(wire.decode(body, StepPlan))
        if pending is not None:
            launched.append(pending)


def _store_file(endpoint: LeaderEndpoint) -> str | None:
    """File of the ranks' store, in the leader's folder; None where a TCP server is the store.

    Torch's TCP store asks for no credential: every user of a machine could read it and write to it.
    Only the leader's user can enter the folder. Groups of GPUs keep TCP, with which NCCL is tested.
    """
    if not endpoint.address.startswith(_IPC) or endpoint.config.device != "cpu":
        return None
    return os.path.join(os.path.dirname(endpoint.address.removeprefix(_IPC)), "store")


def _shared_file(path: str, config: GroupConfig) -> Store:
    """The store of a group on one node."""
    from torch._C._distributed_c10d import FileStore

    return FileStore(path, config.world_size)


def _listen(host: str) -> socket.socket:
    """A listening socket for the rendezvous of the ranks, on any free port."""
    return socket.create_server((host, 0))


def _rendezvous(
    address: RendezvousAddress, config: GroupConfig, rank: int, listening: socket.socket | None
) -> Store:
    """The store for the rendezvous of the ranks; rank 0 serves the store."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(
        address.host,
        address.port,
        config.world_size,
        is_master=rank == 0,
        master_listen_fd=listening.detach() if listening else None,
        wait_for_workers=False,
    )


class _LeaderLink:
    """The sockets to the leader."""

    def __init__(
        self, rank: int, endpoint: LeaderEndpoint, leader_alive: Callable[[], bool]
    ) -> None:
        self._alive = leader_alive
        self._context = zmq.Context()
        self._name, self._endpoint = rank.to_bytes(4, "little"), endpoint
        self._socket = self._connect(self._name)
        self._socket.setsockopt(zmq.RCVTIMEO, int(LEADER_CHECK_S * 1000))
        self._last_progress_s = 0.0
        self._transfer_socket: zmq.Socket[bytes] | None = None
        self._transfer_lock = threading.Lock()

    def _connect(self, identity: bytes) -> zmq.Socket[bytes]:
        """A socket to the leader with a ZeroMQ identity."""
        connected = self._context.socket(zmq.DEALER)
        connected.setsockopt(zmq.IDENTITY, identity)
        connected.setsockopt(zmq.SNDHWM, 0)
        connected.setsockopt(zmq.RCVHWM, 0)
        connected.setsockopt(zmq.LINGER, 1000)
        self._endpoint.secure(connected)
        connected.connect(self._endpoint.address)
        return connected

    def send(self, kind: MessageKind, value: object) -> None:
        """Send a message."""
        self._socket.send_multipart([kind.frame, wire.encode(value)])

    def send_transfer_result(self, result: TransferResult) -> None:
        """Send the result of copied blocks; from any thread, before `close`."""
        self._send_beside(MessageKind.TRANSFER_RESULT, result)

    def send_adapter_result(self, result: AdapterResult) -> None:
        """Send the end of an adapter's load; from any thread, before `close`."""
        self._send_beside(MessageKind.ADAPTER_RESULT, result)

    def send_weights_result(self, result: WeightsResult) -> None:
        """Send the end of a command on weights; from any thread, before `close`."""
        self._send_beside(MessageKind.WEIGHTS_RESULT, result)

    def _send_beside(self, kind: MessageKind, result: object) -> None:
        with self._transfer_lock:  # a second socket, since the main thread waits in the first
            if self._transfer_socket is None:
                self._transfer_socket = self._connect(self._name + b"moved")
            self._transfer_socket.send_multipart([kind.frame, wire.encode(result)])

    def progress(self, done: int, total: int) -> None:
        """Send the progress of loading, at most once per period."""
        now_s = time.monotonic()
        if done == total or now_s - self._last_progress_s > PROGRESS_PERIOD_S:
            self._last_progress_s = now_s
            self.send(MessageKind.LOADING, LoadedBytes(done=done, total=total))

    def receive(self, kind: MessageKind) -> bytes | None:
        """Body of the next message, whose kind must be `kind`; None for a stop.

        Raises:
            LeaderLost: the leader is gone.
        """
        message = self.receive_any(kind)
        return None if message is None else message[1]

    def receive_any(self, *kinds: MessageKind) -> tuple[MessageKind, bytes] | None:
        """Kind and body of the next message, whose kind must be in `kinds`; see `receive`."""
        while True:
            try:
                head, body = self._socket.recv_multipart()
            except zmq.Again:
                if not self._alive():
                    raise LeaderLost from None
                continue
            kind = MessageKind.of_frame(head)
            if kind is MessageKind.STOP:
                return None
            assert kind in kinds, f"message {kind.name}, expected {[kind.name for kind in kinds]}"
            return kind, body

    def has_message(self) -> bool:
        """Whether a message can be received now."""
        return bool(self._socket.poll(0))

    def close(self) -> None:
        """Close the sockets after all messages are sent."""
        self._socket.close()
        if self._transfer_socket is not None:
            self._transfer_socket.close()
        self._context.term()
