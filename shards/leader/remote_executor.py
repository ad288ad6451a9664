"""How plans reach the slices of a group in processes of their own.

`RemoteExecutor` speaks to them, wherever they run; `spawn_group` starts them on this machine. (A
group of one slice needs neither: see `local_executor`.)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import zmq

from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import ArrieroError, CheckpointError, GroupFailed
from arriero.shards.kv.transfers import TransferBatch, TransferResult
from arriero.shards.layout.families import dp_rank_of
from arriero.shards.leader.health import HealthLimits
from arriero.shards.leader.monitor import Monitor
from arriero.shards.protocol.failure import Evidence, FirstCause, Kind
from arriero.shards.protocol.rendezvous import LeaderEndpoint, SliceReport
from arriero.shards.protocol.step_plan import StepPlan, StepResult
from arriero.shards.worker.loop import run_slice

POLL_S = 0.1
Loads = npt.NDArray[np.int64]
LoadProgress = Callable[["Loading"], None]
"""Told how far the group's loading is."""


@dataclass(frozen=True, slots=True)
class Loading:
    """How far a group's loading is: the bytes of all its slices.

    Attributes:
        done: bytes packed.
        total: bytes that slices are known to read; 0 before the first has said so.
        elapsed_s: since the group was started.
    """

    done: int
    total: int
    elapsed_s: float

    @property
    def share(self) -> float:
        """Of the whole, 0 to 1."""
        return self.done / self.total if self.total else 0.0

    def __str__(self) -> str:
        if not self.done:
            return "loading 0 %"
        rate = self.done / max(self.elapsed_s, 1e-3)
        percent = int(self.share * 100)
        return (
            f"loading {percent} %: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, "
            f"{rate / 1e9:.2f} GB/s, {(self.total - self.done) / rate:.0f} s left"
        )


@dataclass(slots=True)
class _SliceState:
    """What the leader has heard of one slice."""

    hello: dict[str, Any] | None = None
    loaded: int = 0
    to_load: int = 0
    report: SliceReport | None = None


class RemoteExecutor:
    """Speaks to a group's slices over one ZeroMQ socket, and hears their pulses over another.

    Not thread-safe but for `report` and `verdict`: one thread at a time calls the rest.
    """

    def __init__(
        self,
        config: GroupConfig,
        host: str | None = None,
        *,
        limits: HealthLimits | None = None,
        on_lost: Callable[[str], None] = lambda cause: None,
    ) -> None:
        """Open the sockets.

        Args:
            config: of the group, resolved.
            host: address to bind to, for slices on other nodes; None is ipc on this one.
            limits: how long a slice may be silent, and the group stuck; None takes the defaults.
            on_lost: called once, from some thread, with what is known when the group is lost.
        """
        self._config = config
        self._on_lost = on_lost
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        pulses = self._context.socket(zmq.PULL)
        pulses.setsockopt(zmq.LINGER, 0)
        keys: dict[str, bytes] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if host is None:
            self._folder = tempfile.TemporaryDirectory(prefix="arriero-")
            address = f"ipc://{self._folder.name}/plans"
            pulse_address = f"ipc://{self._folder.name}/pulses"
            self._socket.bind(address)
            pulses.bind(pulse_address)
        else:
            # only holders of the ticket know the server's public key, without which no CURVE
            # handshake can begin
            server_key, server_secret = zmq.curve_keypair()
            public_key, secret_key = zmq.curve_keypair()
            keys = {"server_key": server_key, "public_key": public_key, "secret_key": secret_key}
            for one in (self._socket, pulses):
                one.curve_server = True
                one.curve_secretkey = server_secret
                one.curve_publickey = server_key
            address = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
            pulse_address = f"tcp://{host}:{pulses.bind_to_random_port(f'tcp://{host}')}"
        self.ticket = LeaderEndpoint(
            address=address, pulse_address=pulse_address, config=config, **keys
        )
        self._identities = [rank.to_bytes(4, "little") for rank in range(config.world_size)]
        self._slices = [_SliceState() for _ in self._identities]
        self._loads: dict[int, Loads] = {}
        self._results: deque[bytes] = deque()
        self._moved: list[TransferResult] = []
        self._failure: ArrieroError | None = None
        self._lost = threading.Lock()
        self._closing: Callable[[], None] = lambda: None
        self._closed = False
        self._monitor = Monitor(
            pulses, config.world_size, limits or HealthLimits(), self._on_evidence
        )

    def on_watch(self, watch: Callable[[], Evidence | None], closing: Callable[[], None]) -> None:
        """Set what tells whether a slice is lost, and what stops the slices at the end.

        Args:
            watch: asked several times a second, from a thread of its own.
            closing: called once by `close`, after the slices were told to stop.
        """
        self._closing = closing
        self._monitor.watch = watch

    def set_limits(self, limits: HealthLimits) -> None:
        """Judge the slices by other limits from now on. Thread-safe."""
        self._monitor.set_limits(limits)

    def report(self, evidence: Evidence) -> None:
        """Take in evidence that something is wrong: the group is lost. Thread-safe."""
        self._monitor.report(evidence)

    def verdict(self) -> FirstCause | None:
        """The first cause once all that belongs to the failure is in; None while all is well.

        Waits for some tenths of a second at most. Safe from any thread, also after `close`.
        """
        return self._monitor.verdict()

    def _on_evidence(self, evidence: Evidence) -> None:
        """The group is lost: whoever waits for a result is told at once."""
        with self._lost:
            first = self._failure is None
            if first:
                self._failure = GroupFailed(evidence.what)
        if first:
            self._on_lost(evidence.what)

    def wait_ready(
        self, timeout_s: float, progress: LoadProgress | None = None
    ) -> list[SliceReport]:
        """Wait until every slice has loaded and joined; returns their reports by rank.

        Raises:
            CheckpointError: the weights are not what their config says.
            GroupFailed: a slice is lost, or the time is up.
        """
        begun_s = time.monotonic()
        deadline = begun_s + timeout_s
        joined = False
        while any(one.report is None for one in self._slices):
            self._pump(POLL_S)
            if progress is not None:
                done = sum(one.loaded for one in self._slices)
                total = sum(one.to_load for one in self._slices)
                progress(Loading(done, total, time.monotonic() - begun_s))
            if not joined and all(one.hello is not None for one in self._slices):
                first = self._slices[0].hello
                assert first is not None
                where = msgpack.packb({"host": first["host"], "port": first["port"]})
                self._tell(range(len(self._identities)), b"J", where)
                joined = True
            if time.monotonic() > deadline:
                late = [rank for rank, one in enumerate(self._slices) if one.report is None]
                raise GroupFailed(
                    f"slices {late} of {len(self._slices)} were not ready after {timeout_s:g} s"
                )
        self._monitor.judge()  # before, whoever loads may well be silent
        return [one.report for one in self._slices if one.report is not None]

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every slice of its lane."""
        self._monitor.planned(plan.step, plan.dp_rank)
        self._tell(self._lane(plan.dp_rank), b"P", plan.to_bytes())

    def _lane(self, dp_rank: int) -> list[int]:
        ranks = range(len(self._identities))
        return [rank for rank in ranks if dp_rank_of(self._config, rank) == dp_rank]

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Result of the oldest plan outstanding, or None at the time limit.

        Raises:
            GroupFailed: a slice is lost; the text is the first cause.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
            # some may have come while copies were waited for
            result = self._results.popleft() if self._results else self._pump(max(left, 0.0))
            if result is not None:
                step = StepResult.from_bytes(result)
                self._monitor.answered(step.step, step.dp_rank)
                return step
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def take_loads(self) -> Mapping[int, Loads]:
        """What slices have told since the last call; see `Executor.take_loads`."""
        taken, self._loads = self._loads, {}
        return taken

    def move(self, moves: TransferBatch) -> None:
        """Send copies of blocks to every slice of their lane, behind the plans."""
        self._tell(self._lane(moves.dp_rank), b"M", moves.to_bytes())

    def moved(self, timeout_s: float = 0.0) -> list[TransferResult]:
        """What slices said of copies since the last call; waits for the first until the limit.

        Raises:
            GroupFailed: a slice is lost; the text is the first cause.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = 0.0 if self._moved else max(0.0, deadline - time.monotonic())
            waiting = self._socket.poll(int(left * 1000))
            if not waiting:
                if self._failure is not None:
                    raise self._failure
                break
            result = self._pump(0.0)
            if result is not None:
                self._results.append(result)
                break
        found, self._moved = self._moved, []
        return found

    def close(self) -> None:
        """Stop the slices; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        while self._failure is not None and self._monitor.settling:  # who else has what to say?
            with contextlib.suppress(ArrieroError):
                self._pump(POLL_S)
        for identity in self._identities:
            try:
                self._socket.send_multipart([identity, b"S", b""])
            except zmq.ZMQError:
                continue  # never connected, or gone
        self._monitor.close()
        self._socket.close(linger=500)
        self._context.term()
        self._closing()
        if self._folder is not None:
            self._folder.cleanup()

    def _tell(self, ranks: Iterable[int], kind: bytes, body: bytes) -> None:
        for rank in ranks:
            try:
                self._socket.send_multipart([self._identities[rank], kind, body])
            except zmq.ZMQError as error:
                what = f"slice {rank} cannot be reached: {error}"
                self._monitor.report_slice(rank, Kind.ABORTED, what)
                raise self._failure or GroupFailed(what) from None

    def _pump(self, wait_s: float) -> bytes | None:
        """Take in one message, if one comes in time; a result's bytes are returned."""
        if not self._socket.poll(int(wait_s * 1000)):
            if self._failure is not None:
                raise self._failure
            return None
        identity, kind, body = self._socket.recv_multipart()
        if kind == b"T":
            return body
        if kind == b"V":
            self._moved.append(TransferResult.from_bytes(body))
            return None
        rank = int.from_bytes(identity, "little")
        self._hear(rank, kind, msgpack.unpackb(body))
        return None

    def _hear(self, rank: int, kind: bytes, body: dict[str, Any]) -> None:
        state = self._slices[rank]
        if kind == b"H":
            state.hello = body
            self._monitor.name(rank, f"slice {rank} (pid {body['pid']} on {body['host']})", body)
        elif kind == b"L":
            state.loaded, state.to_load = body["done"], body["total"]
        elif kind == b"C":
            for layer, counts in zip(body["layers"], body["loads"], strict=True):
                loads_E = np.asarray(counts, dtype=np.int64)
                self._loads[layer] = self._loads.get(layer, 0) + loads_E
        elif kind == b"R":
            state.report, state.loaded = SliceReport(**body), state.to_load
        elif kind == b"E":
            if self._failure is None and body["error"].startswith("CheckpointError: "):
                self._failure = CheckpointError(body["error"].removeprefix("CheckpointError: "))
            self._monitor.raised(rank, body)
            raise self._failure or GroupFailed(body["error"])


def spawn_group(config: GroupConfig) -> RemoteExecutor:
    """Start a group's slices as child processes of this one; `close` stops them.

    Args:
        config: of the group, resolved.

    Raises:
        GroupFailed: fewer GPUs are visible than there are slices.
    """
    if config.device == "cuda":
        for rank in range(config.world_size):
            device_of(rank)  # what is missing is told before anything starts
    executor = RemoteExecutor(config)
    context = multiprocessing.get_context("spawn")
    children: list[BaseProcess] = [
        context.Process(
            target=_child, args=(rank, executor.ticket, os.getpid()), name=f"slice-{rank}"
        )
        for rank in range(config.world_size)
    ]
    for child in children:
        child.start()

    def watch() -> Evidence | None:
        for rank, child in enumerate(children):
            if child.exitcode is not None:
                what = f"slice {rank} (pid {child.pid}) ended with exit code {child.exitcode}"
                return Evidence(kind=Kind.CRASH, what=what, rank=rank, pid=child.pid or 0)
        return None

    def closing() -> None:
        for child in children:
            child.join(5)
            if child.exitcode is None:
                child.kill()
                child.join()

    executor.on_watch(watch, closing)
    return executor


def device_of(rank: int) -> str:
    """The GPU of a rank on this machine: of those that this process may see, or of all.

    Raises:
        GroupFailed: this process may not see that many.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(rank)
    devices = [one.strip() for one in visible.split(",") if one.strip()]
    if rank >= len(devices):
        raise GroupFailed(
            f"slice {rank} has no GPU: CUDA_VISIBLE_DEVICES={visible!r} names {len(devices)}; "
            "name one for each slice, or use fewer slices"
        )
    return devices[rank]


def _child(rank: int, ticket: LeaderEndpoint, parent: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(ticket.config.threads or 1))
    if ticket.config.device == "cuda":  # each rank its own; NCCL refuses two on one
        os.environ["CUDA_VISIBLE_DEVICES"] = device_of(rank)
    try:
        run_slice(rank, ticket, leader_alive=lambda: os.getppid() == parent)
    except Exception:
        raise SystemExit(1) from None  # the leader has the cause
