"""Executor of a group whose slices run in processes of their own.

`RemoteExecutor` sends plans to the slices, wherever they run; `spawned_group` starts slices on this
machine. (A group of a single slice needs neither: see `local_executor`.) Knows sockets and
messages; knows nothing of how a plan is made or run.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import ArrieroError, CheckpointError, GroupFailed
from arriero.shards.kv.transfers import TransferBatch, TransferResult
from arriero.shards.leader.health import HealthLimits
from arriero.shards.leader.loading import Loading, LoadProgress
from arriero.shards.leader.monitor import Monitor
from arriero.shards.protocol import wire
from arriero.shards.protocol.adapters import AdapterBatch, AdapterResult
from arriero.shards.protocol.failure import Evidence, FirstCause, Kind
from arriero.shards.protocol.messages import (
    LoadedBytes,
    MessageKind,
    RendezvousAddress,
    SliceFailure,
    SliceHello,
)
from arriero.shards.protocol.rendezvous import LeaderEndpoint, SliceReport, secured
from arriero.shards.protocol.step_plan import StepPlan, StepResult
from arriero.shards.protocol.weights import WeightsCommand, WeightsResult

POLL_S = 0.1
Loads = npt.NDArray[np.int64]
_BESIDE: dict[MessageKind, type[TransferResult | AdapterResult | WeightsResult]] = {
    MessageKind.TRANSFER_RESULT: TransferResult,
    MessageKind.ADAPTER_RESULT: AdapterResult,
    MessageKind.WEIGHTS_RESULT: WeightsResult,
}
"""Messages of slices that belong to no step, and the type of each."""


@dataclass(slots=True)
class _SliceState:
    """Messages of one slice so far."""

    hello: SliceHello | None = None
    loaded: LoadedBytes = field(default_factory=LoadedBytes)
    report: SliceReport | None = None


class RemoteExecutor:
    """Talks to a group's slices over one ZeroMQ socket and receives heartbeats over another.

    Not thread-safe, except `report` and `first_cause`: call the rest from one thread at a time.
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
            config: resolved config of the group.
            host: address to bind to, for slices on other nodes; None means ipc on this node.
            limits: limits of silence, hangs and steps; None means the defaults.
            on_lost: callback when the group is lost, with a summary; called once, from any thread.
        """
        self._config = config
        self._on_lost = on_lost
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        heartbeats = self._context.socket(zmq.PULL)
        heartbeats.setsockopt(zmq.LINGER, 0)
        keys: dict[str, bytes] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if host is None:
            self._folder = tempfile.TemporaryDirectory(prefix="arriero-")
            address = f"ipc://{self._folder.name}/plans"
            heartbeat_address = f"ipc://{self._folder.name}/heartbeats"
            self._socket.bind(address)
            heartbeats.bind(heartbeat_address)
        else:
            keys = secured((self._socket, heartbeats))
            address = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
            heartbeat_address = f"tcp://{host}:{heartbeats.bind_to_random_port(f'tcp://{host}')}"
        self.endpoint = LeaderEndpoint(
            address=address, heartbeat_address=heartbeat_address, config=config, **keys
        )
        self._identities = [rank.to_bytes(4, "little") for rank in range(config.world_size)]
        self._slices = [_SliceState() for _ in self._identities]
        self._loads: dict[int, Loads] = {}
        self._results: deque[bytes] = deque()
        self._beside: dict[MessageKind, list[Any]] = {kind: [] for kind in _BESIDE}
        self._num_changing = 0  # slices that release or load weights
        self._failure: ArrieroError | None = None
        self._failure_lock = threading.Lock()
        self._stop_slices: Callable[[], None] = lambda: None
        self._closed = False
        self._monitor = Monitor(
            heartbeats, config.world_size, limits or HealthLimits(), self._on_evidence
        )

    def supervise(
        self, find_lost: Callable[[], Evidence | None], stop_slices: Callable[[], None]
    ) -> None:
        """Set the callbacks of the process that started the slices.

        Args:
            find_lost: returns evidence of a lost slice, if any; called several times a second,
                from a thread of its own.
            stop_slices: ends the slices; called once by `close`, after the stop messages.
        """
        self._stop_slices = stop_slices
        self._monitor.find_lost = find_lost

    def set_limits(self, limits: HealthLimits) -> None:
        """Replace the health limits from now on. Thread-safe."""
        self._monitor.set_limits(limits)

    def report(self, evidence: Evidence) -> None:
        """Add evidence of a failure: the group is lost. Thread-safe."""
        self._monitor.report(evidence)

    def first_cause(self) -> FirstCause | None:
        """The first cause, once the evidence has settled; None while the group is healthy.

        Waits for some tenths of a second at most. Safe from any thread, also after `close`.
        """
        return self._monitor.first_cause()

    def _on_evidence(self, evidence: Evidence) -> None:
        """Mark the group as lost, so that a wait for a result ends at once."""
        with self._failure_lock:
            is_first = self._failure is None
            if is_first:
                self._failure = GroupFailed(evidence.summary)
        if is_first:
            self._on_lost(evidence.summary)

    def wait_ready(
        self, timeout_s: float, progress: LoadProgress | None = None
    ) -> list[SliceReport]:
        """Wait until every slice has loaded and joined; returns the reports by rank.

        Raises:
            CheckpointError: the weights do not match their config.
            GroupFailed: a slice is lost, or the time is up.
        """
        start_s = time.monotonic()
        deadline = start_s + timeout_s
        joined = False
        while any(state.report is None for state in self._slices):
            self._receive(POLL_S)
            if progress is not None:
                done = sum(state.loaded.done for state in self._slices)
                total = sum(state.loaded.total for state in self._slices)
                progress(Loading(done, total, time.monotonic() - start_s))
            if not joined and all(state.hello is not None for state in self._slices):
                hello = self._slices[0].hello
                assert hello is not None
                store = RendezvousAddress(host=hello.host, port=hello.port)
                self._send(range(len(self._identities)), MessageKind.JOIN, store)
                joined = True
            if time.monotonic() > deadline:
                late = [rank for rank, state in enumerate(self._slices) if state.report is None]
                raise GroupFailed(
                    f"slices {late} of {len(self._slices)} were not ready after {timeout_s:g} s"
                )
        self._monitor.judge()  # not before: a slice that loads may be silent
        return [state.report for state in self._slices if state.report is not None]

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every slice of the plan's data-parallel rank."""
        self._monitor.plan_sent(plan.step, plan.dp_rank)
        self._send(self._ranks_of(plan.dp_rank), MessageKind.PLAN, plan)

    def _ranks_of(self, dp_rank: int) -> list[int]:
        ranks = range(len(self._identities))
        return [rank for rank in ranks if self._config.dp_rank_of(rank) == dp_rank]

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """Result of the oldest outstanding plan, or None at the time limit.

        Raises:
            GroupFailed: a slice is lost; the text is the first cause.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
            # `collect_transfers` may have received results of plans
            packed = self._results.popleft() if self._results else self._receive(max(left, 0.0))
            if packed is not None:
                result = wire.decode(packed, StepResult)
                self._monitor.result_received(result.step, result.dp_rank)
                return result
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def take_loads(self) -> Mapping[int, Loads]:
        """Expert loads reported since the last call; see `Executor.take_loads`."""
        loads, self._loads = self._loads, {}
        return loads

    def transfer(self, batch: TransferBatch) -> None:
        """Send transfers to every slice of the batch's data-parallel rank, after the plans."""
        self._send(self._ranks_of(batch.dp_rank), MessageKind.TRANSFER, batch)

    def collect_transfers(self, timeout_s: float = 0.0) -> list[TransferResult]:
        """Transfer results since the last call; waits for the first until the time limit.

        Raises:
            GroupFailed: a slice is lost; the text is the first cause.
        """
        return self._collect_beside(MessageKind.TRANSFER_RESULT, timeout_s)

    def change_adapters(self, batch: AdapterBatch) -> None:
        """Send loads and drops of adapters to every slice of the data-parallel rank."""
        self._send(self._ranks_of(batch.dp_rank), MessageKind.ADAPTERS, batch)

    def collect_adapters(self, timeout_s: float = 0.0) -> list[AdapterResult]:
        """Ends of loads since the last call; waits for the first until the time limit.

        Raises:
            GroupFailed: a slice is lost; the text is the first cause.
        """
        return self._collect_beside(MessageKind.ADAPTER_RESULT, timeout_s)

    def change_weights(self, command: WeightsCommand) -> None:
        """Send a command on weights to every slice, after the plans."""
        if command.action.between_steps:
            self._monitor.suspend()
            self._num_changing = len(self._identities)
        self._send(range(len(self._identities)), MessageKind.WEIGHTS, command)

    def collect_weights(self, timeout_s: float = 0.0) -> list[WeightsResult]:
        """Ends of commands since the last call; waits for the first until the time limit.

        Raises:
            GroupFailed: a slice is lost; the text is the first cause.
        """
        results = self._collect_beside(MessageKind.WEIGHTS_RESULT, timeout_s)
        if self._num_changing:
            self._num_changing -= len(results)
            if not self._num_changing:
                self._monitor.judge()
        return results

    def _collect_beside(self, kind: MessageKind, timeout_s: float) -> list[Any]:
        self._receive_beside(self._beside[kind], timeout_s)
        results, self._beside[kind] = self._beside[kind], []
        return results

    def _receive_beside(self, results: Sized, timeout_s: float) -> None:
        """Receive until no message waits, or a step's result came; see `collect_transfers`."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = 0.0 if len(results) else max(0.0, deadline - time.monotonic())
            readable = self._socket.poll(int(left * 1000))
            if not readable:
                if self._failure is not None:
                    raise self._failure
                return
            packed = self._receive(0.0)
            if packed is not None:
                self._results.append(packed)
                return

    def close(self) -> None:
        """Stop the slices; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        while self._failure is not None and self._monitor.settling:  # more evidence may come
            with contextlib.suppress(ArrieroError):
                self._receive(POLL_S)
        for identity in self._identities:
            try:
                self._socket.send_multipart([identity, MessageKind.STOP.frame, b""])
            except zmq.ZMQError:
                continue  # never connected, or gone
        self._monitor.close()
        self._socket.close(linger=500)
        self._context.term()
        self._stop_slices()
        if self._folder is not None:
            self._folder.cleanup()

    def _send(self, ranks: Iterable[int], kind: MessageKind, value: object) -> None:
        body = wire.encode(value)
        for rank in ranks:
            try:
                self._socket.send_multipart([self._identities[rank], kind.frame, body])
            except zmq.ZMQError as error:
                summary = f"slice {rank} cannot be reached: {error}"
                self._monitor.report_slice(rank, Kind.ABORTED, summary)
                raise self._failure or GroupFailed(summary) from None

    def _receive(self, wait_s: float) -> bytes | None:
        """Take one message, if any arrives in time; returns the bytes of a step result."""
        if not self._socket.poll(int(wait_s * 1000)):
            if self._failure is not None:
                raise self._failure
            return None
        identity, head, body = self._socket.recv_multipart()
        kind = MessageKind.of_frame(head)
        if kind is MessageKind.RESULT:
            return body
        if (result_type := _BESIDE.get(kind)) is not None:
            self._beside[kind].append(wire.decode(body, result_type))
            return None
        rank = int.from_bytes(identity, "little")
        self._accept(rank, kind, body)
        return None

    def _accept(self, rank: int, kind: MessageKind, body: bytes) -> None:
        state = self._slices[rank]
        if kind is MessageKind.HELLO:
            state.hello = wire.decode(body, SliceHello)
            self._monitor.name(rank, state.hello)
        elif kind is MessageKind.LOADING:
            state.loaded = wire.decode(body, LoadedBytes)
        elif kind is MessageKind.EXPERT_LOADS:
            for layer, loads_E in wire.decode(body, dict[int, Loads]).items():
                self._loads[layer] = self._loads.get(layer, 0) + loads_E
        elif kind is MessageKind.READY:
            state.report = wire.decode(body, SliceReport)
            state.loaded = replace(state.loaded, done=state.loaded.total)
        elif kind is MessageKind.ERROR:
            failure = wire.decode(body, SliceFailure)
            if self._failure is None and failure.error.startswith("CheckpointError: "):
                self._failure = CheckpointError(failure.error.removeprefix("CheckpointError: "))
            self._monitor.report_error(rank, failure)
            raise self._failure or GroupFailed(failure.error)
