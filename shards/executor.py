"""Executors: how plans reach the slices of a group.

`LocalExecutor` runs the only slice of a group in this process; `RemoteExecutor` speaks to slices
in processes of their own, wherever they run; `spawn_group` starts such processes on this machine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import msgpack
import zmq

from arriero.shards.errors import ArrieroError, CheckpointError, GroupFailed
from arriero.shards.group import GroupConfig
from arriero.shards.kv.moves import Moved, Moves
from arriero.shards.plan import StepPlan, StepResult
from arriero.shards.slice import SliceReport, Ticket, run_slice

if TYPE_CHECKING:
    from arriero.shards.runner import Pending, Runner

POLL_S = 0.1
LoadProgress = Callable[[float], None]
"""Called with the share of the group's loading that is done, 0 to 1."""


class LocalExecutor:
    """Runs a single-slice group in a thread of this process."""

    def __init__(self, config: GroupConfig) -> None:
        from arriero.shards.runner import runner_for

        self._runner: Runner | None = runner_for(config, 0)
        self._moved: queue.SimpleQueue[Moved] = queue.SimpleQueue()
        self._mover = self._runner.open_tiers(self._moved.put)
        self._plans: queue.SimpleQueue[StepPlan | Moves | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Pending | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="slice", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan."""
        self._plans.put(plan)

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Result of the oldest plan outstanding, or None at the time limit."""
        try:
            got = self._results.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(got, BaseException):
            raise GroupFailed(f"slice 0 failed in a step: {type(got).__name__}: {got}") from got
        return got.wait()

    def move(self, moves: Moves) -> None:
        """Queue moves behind the plans."""
        self._plans.put(moves)

    def moved(self, timeout_s: float = 0.0) -> list[Moved]:
        """What came of moves since the last call; waits for the first until the limit."""
        found: list[Moved] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._moved.get(timeout_s > 0, timeout_s))
            while True:
                found.append(self._moved.get_nowait())
        return found

    def close(self) -> None:
        """Stop the threads and give the weights back; safe to call twice."""
        self._plans.put(None)
        self._thread.join()
        if self._mover is not None:
            self._mover.close()
            self._mover = None
        self._runner = None

    def _run(self) -> None:
        runner = self._runner
        assert runner is not None, "set before the thread starts"
        try:
            while (plan := self._plans.get()) is not None:
                if isinstance(plan, Moves):
                    if self._mover is not None:
                        self._mover.submit(plan)
                    continue
                pending = runner.launch(plan)
                assert pending is not None, "the only slice of a group samples"
                self._results.put(pending)
        except Exception as error:
            self._results.put(error)


@dataclass(slots=True)
class _SliceState:
    """What the leader has heard of one slice."""

    hello: dict[str, Any] | None = None
    loaded: float = 0.0
    report: SliceReport | None = None


class RemoteExecutor:
    """Speaks to a group's slices over one ZeroMQ socket.

    Not thread-safe but for `fail`: one thread at a time calls the rest.
    """

    def __init__(self, config: GroupConfig, host: str | None = None) -> None:
        """Open the socket.

        Args:
            config: of the group, resolved.
            host: address to bind to, for slices on other nodes; None is ipc on this one.
        """
        self._config = config
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        keys: dict[str, bytes] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if host is None:
            self._folder = tempfile.TemporaryDirectory(prefix="arriero-")
            address = f"ipc://{self._folder.name}/plans"
            self._socket.bind(address)
        else:
            # only holders of the ticket know the server's public key, without which no CURVE
            # handshake can begin
            server_key, server_secret = zmq.curve_keypair()
            public_key, secret_key = zmq.curve_keypair()
            keys = {"server_key": server_key, "public_key": public_key, "secret_key": secret_key}
            self._socket.curve_server = True
            self._socket.curve_secretkey = server_secret
            self._socket.curve_publickey = server_key
            port = self._socket.bind_to_random_port(f"tcp://{host}")
            address = f"tcp://{host}:{port}"
        self.ticket = Ticket(address=address, config=config, **keys)
        self._identities = [rank.to_bytes(4, "little") for rank in range(config.world_size)]
        self._slices = [_SliceState() for _ in self._identities]
        self._results: deque[bytes] = deque()
        self._moved: list[Moved] = []
        self._failure: ArrieroError | None = None
        self._watch: Callable[[], str | None] = lambda: None
        self._closing: Callable[[], None] = lambda: None
        self._closed = False

    def on_watch(self, watch: Callable[[], str | None], closing: Callable[[], None]) -> None:
        """Set what tells whether a slice is lost, and what stops the slices at the end.

        Args:
            watch: asked while results are awaited; gives the cause in words, or None.
            closing: called once by `close`, after the slices were told to stop.
        """
        self._watch, self._closing = watch, closing

    def fail(self, cause: str) -> None:
        """Declare the group lost; the first cause stays. Thread-safe."""
        if self._failure is None:
            self._failure = GroupFailed(cause)

    def wait_ready(
        self, timeout_s: float, progress: LoadProgress | None = None
    ) -> list[SliceReport]:
        """Wait until every slice has loaded and joined; returns their reports by rank.

        Raises:
            CheckpointError: the weights are not what their config says.
            GroupFailed: a slice is lost, or the time is up.
        """
        deadline = time.monotonic() + timeout_s
        joined = False
        while any(one.report is None for one in self._slices):
            self._pump(POLL_S)
            if progress is not None:
                progress(sum(one.loaded for one in self._slices) / len(self._slices))
            if not joined and all(one.hello is not None for one in self._slices):
                first = self._slices[0].hello
                assert first is not None
                where = msgpack.packb({"host": first["host"], "port": first["port"]})
                self._tell_all(b"J", where)
                joined = True
            if time.monotonic() > deadline:
                late = [rank for rank, one in enumerate(self._slices) if one.report is None]
                raise GroupFailed(
                    f"slices {late} of {len(self._slices)} were not ready after {timeout_s:g} s"
                )
        return [one.report for one in self._slices if one.report is not None]

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every slice."""
        self._tell_all(b"P", plan.to_bytes())

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Result of the oldest plan outstanding, or None at the time limit.

        Raises:
            GroupFailed: a slice is lost; the text is the first cause.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self._results:  # they came while moves were waited for
            return StepResult.from_bytes(self._results.popleft())
        while True:
            left = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
            result = self._pump(max(left, 0.0))
            if result is not None:
                return StepResult.from_bytes(result)
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def move(self, moves: Moves) -> None:
        """Send moves to every slice, behind the plans."""
        self._tell_all(b"M", moves.to_bytes())

    def moved(self, timeout_s: float = 0.0) -> list[Moved]:
        """What slices said of moves since the last call; waits for the first until the limit.

        Raises:
            GroupFailed: a slice is lost; the text is the first cause.
        """
        deadline = time.monotonic() + timeout_s
        while not self._moved:
            left = deadline - time.monotonic()
            result = self._pump(max(left, 0.0))
            if result is not None:
                self._results.append(result)
            if left <= 0:
                break
        found, self._moved = self._moved, []
        return found

    def close(self) -> None:
        """Stop the slices; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for identity in self._identities:
            try:
                self._socket.send_multipart([identity, b"S", b""])
            except zmq.ZMQError:
                continue  # never connected, or gone
        self._socket.close(linger=500)
        self._context.term()
        self._closing()
        if self._folder is not None:
            self._folder.cleanup()

    def _tell_all(self, kind: bytes, body: bytes) -> None:
        for rank, identity in enumerate(self._identities):
            try:
                self._socket.send_multipart([identity, kind, body])
            except zmq.ZMQError as error:
                self.fail(self._watch() or f"slice {rank} cannot be reached: {error}")
                raise self._failure or GroupFailed(str(error)) from None

    def _pump(self, wait_s: float) -> bytes | None:
        """Take in one message, if one comes in time; a result's bytes are returned."""
        if not self._socket.poll(int(wait_s * 1000)):
            if self._failure is None and (cause := self._watch()) is not None:
                self.fail(cause)
            if self._failure is not None:
                raise self._failure
            return None
        identity, kind, body = self._socket.recv_multipart()
        if kind == b"T":
            return body
        if kind == b"V":
            self._moved.append(Moved.from_bytes(body))
            return None
        rank = int.from_bytes(identity, "little")
        self._hear(rank, kind, msgpack.unpackb(body))
        return None

    def _hear(self, rank: int, kind: bytes, body: dict[str, Any]) -> None:
        state = self._slices[rank]
        if kind == b"H":
            state.hello = body
        elif kind == b"L":
            state.loaded = body["done"] / body["total"]
        elif kind == b"R":
            state.report, state.loaded = SliceReport(**body), 1.0
        elif kind == b"E":
            if self._failure is None:
                self._failure = self._first_cause(rank, body)
            raise self._failure

    def _first_cause(self, rank: int, body: dict[str, Any]) -> ArrieroError:
        """The cause behind a slice's error: a dead peer shows up as its neighbours' errors."""
        if body["error"].startswith("CheckpointError: "):
            return CheckpointError(body["error"].removeprefix("CheckpointError: "))
        time.sleep(POLL_S)
        where = f"slice {rank} failed in {body['phase']}: {body['error']}"
        cause = self._watch()
        return GroupFailed(f"{cause} (then {where})" if cause else where)


def spawn_group(config: GroupConfig) -> RemoteExecutor:
    """Start a group's slices as child processes of this one; `close` stops them.

    Args:
        config: of the group, resolved.
    """
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

    def watch() -> str | None:
        for rank, child in enumerate(children):
            if child.exitcode is not None:
                return f"slice {rank} (pid {child.pid}) ended with exit code {child.exitcode}"
        return None

    def closing() -> None:
        for child in children:
            child.join(5)
            if child.exitcode is None:
                child.kill()
                child.join()

    executor.on_watch(watch, closing)
    return executor


def _child(rank: int, ticket: Ticket, parent: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(ticket.config.threads or 1))
    try:
        run_slice(rank, ticket, leader_alive=lambda: os.getppid() == parent)
    except Exception:
        raise SystemExit(1) from None  # the leader has the cause
