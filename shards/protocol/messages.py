"""Messages between a leader and its slices: kinds, and the bodies that have no module of their own.

A message is two frames: the name of its kind, and a body in the bytes of `wire`. Knows kinds and
contents; knows nothing of sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from arriero.shards.errors import WireError


class MessageKind(StrEnum):
    """Kind of a message; the value is the first frame.

    Attributes:
        HELLO: slice to leader: process started; `SliceHello`.
        LOADING: slice to leader: bytes loaded so far; `LoadedBytes`.
        READY: slice to leader: slice loaded; `SliceReport`.
        RESULT: slice to leader: result of a step plan; `StepResult`.
        TRANSFER_RESULT: slice to leader: result of a transfer of KV blocks; `TransferResult`.
        ADAPTER_RESULT: slice to leader: end of an adapter's load; `AdapterResult`.
        WEIGHTS_RESULT: slice to leader: end of a command on weights; `WeightsResult`.
        EXPERT_LOADS: slice to leader: tokens per expert since the last message of this kind, an
            array for each layer.
        ERROR: slice to leader: error that ends the slice; `SliceFailure`.
        JOIN: leader to slice: address at which the ranks meet; `RendezvousAddress`.
        PLAN: leader to slice: step plan to run; `StepPlan`.
        TRANSFER: leader to slice: KV blocks to transfer; `TransferBatch`.
        ADAPTERS: leader to slice: adapters to load or to drop; `AdapterBatch`.
        WEIGHTS: leader to slice: check, release or load weights; `WeightsCommand`.
        STOP: leader to slice: end the loop; no body.
    """

    HELLO = "hello"
    LOADING = "loading"
    READY = "ready"
    RESULT = "result"
    TRANSFER_RESULT = "transfer result"
    ADAPTER_RESULT = "adapter result"
    WEIGHTS_RESULT = "weights result"
    EXPERT_LOADS = "expert loads"
    ERROR = "error"
    JOIN = "join"
    PLAN = "plan"
    TRANSFER = "transfer"
    ADAPTERS = "adapters"
    WEIGHTS = "weights"
    STOP = "stop"

    @property
    def frame(self) -> bytes:
        """The first frame of a message of this kind."""
        return self.value.encode()

    @classmethod
    def of_frame(cls, frame: bytes) -> MessageKind:
        """The kind of a message, from its first frame.

        Raises:
            WireError: no kind has this name.
        """
        kind = _KIND_OF_FRAME.get(frame)
        if kind is None:
            raise WireError(f"unknown kind of message {frame[:32]!r}; expected {[*cls]}")
        return kind


_KIND_OF_FRAME = {kind.frame: kind for kind in MessageKind}


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceHello:
    """A slice's process has started.

    Attributes:
        host: address of the slice's node.
        port: port at which rank 0 serves the rendezvous of the ranks; 0 on the other ranks.
        pid: process of the slice.
    """

    host: str
    port: int
    pid: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBytes:
    """Progress of a slice's loading: bytes packed, of bytes to read."""

    done: int = 0
    total: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RendezvousAddress:
    """Address at which the ranks of a group meet; port 0 where they meet in a file."""

    host: str
    port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceFailure:
    """The error that ends a slice.

    Attributes:
        phase: phase of the slice's step: "load", "plan", "layers", …
        step: number of the step.
        collective: collective that broke off; "" for an error of the slice's own.
        error: class and text of the error.
        at: last lines of the traceback.
        log: last lines logged by the slice.
    """

    phase: str
    step: int
    collective: str
    error: str
    at: str
    log: tuple[str, ...]
