"""What a simulated device was asked for: waits, copies from pageable memory, captures, launches.

Knows counts and lines of the product; knows nothing of tensors' contents.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.fake_cuda.streams import Streams

ROOMS = ("/shards/", "/kernels/", "/router/", "/cluster/")
"""Folders of the product: a wait is counted with its line there."""
REFUSED = "CUDA error: operation not permitted when stream is capturing"


@dataclass
class Recorded:
    """One op of a captured graph.

    Attributes:
        run: does it again over the same memory.
        name: of the kernel, of torch's op or of the collective.
        outputs: plain tensors that it made then, where a replay has to put what it makes.
    """

    run: Callable[[], Any]
    name: str
    outputs: list[Any] = field(default_factory=list)


@dataclass
class Capture:
    """A capture under way: which thread does it, in which mode, and what it has recorded."""

    thread: threading.Thread
    mode: str
    recorded: list[Recorded]


class Ledger:
    """Counts of one simulated device.

    Attributes:
        waits: of the host for the device, by kind and line: copies to the host, and ops whose
            result's shape or value the host needs.
        events: of the host for an event or a stream, likewise; those are asked for by name.
        pageable: copies from or to memory that is not pinned.
        captures: graphs captured, in `capture_modes`; names of their ops are in `recordings`.
        replays: of captured graphs.
        launches: Triton kernels, by name; replayed ones too.
        binaries: Triton kernels with what each binary is compiled for; see `specialization`.
        compiles: new binaries, by name of the kernel.
        collectives: by name and ranks.
        messages: each collective in its order: its name, its ranks and its number of elements.
        streams: the device's streams, which refuse what no wait puts in order.
        free_bytes: what `torch.cuda.mem_get_info` gives as free, before tensors.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.binaries: set[tuple[Any, ...]] = set()
        self.compiles: Counter[str] = Counter()
        self.collectives: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.messages: list[tuple[str, tuple[int, ...], int]] = []
        self.streams: Streams
        self.captures = self.replays = 0
        self.capture_modes: set[str] = set()
        self.recordings: list[list[str]] = []
        self.free_bytes = 80 << 30
        self.capture: Capture | None = None
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget what was counted; binaries stay compiled."""
        for counts in (self.waits, self.events, self.pageable, self.launches, self.compiles):
            counts.clear()
        self.collectives.clear()
        self.messages.clear()
        self.replays = 0

    @contextmanager
    def capturing(self, recorded: list[Recorded], mode: str) -> Iterator[None]:
        """Record what this thread does on the device."""
        with self._lock:
            assert self.capture is None, "one capture at a time"
            self.capture = Capture(threading.current_thread(), mode, recorded)
        self.captures += 1
        self.capture_modes.add(mode)
        try:
            yield
        finally:
            self.capture = None
        self.recordings.append([op.name for op in recorded])

    @property
    def recording(self) -> list[Recorded] | None:
        """Where this thread's ops are to be recorded; None where it captures nothing."""
        capture = self.capture
        if capture is None or capture.thread is not threading.current_thread():
            return None
        return capture.recorded

    def wait(self, kind: str) -> None:
        """The host waits for the device."""
        self.refuse(kind)
        self.streams.host_waits()
        self.waits[f"{kind} @ {where()}"] += 1

    def event(self, kind: str) -> None:
        """The host asks an event or a stream."""
        self.refuse(kind)
        self.events[f"{kind} @ {where()}"] += 1

    def copy_pageable(self, kind: str) -> None:
        """A copy between the device and memory that is not pinned."""
        if self.recording is not None:
            raise RuntimeError(f"{REFUSED}: {kind} of pageable memory @ {where()}")
        self.pageable[f"{kind} @ {where()}"] += 1

    def allocate(self) -> None:
        """Memory of the device may have to be asked for; only the capturing thread has a pool."""
        if self.capture is not None and self.recording is None:
            self.refuse("cudaMalloc")

    def refuse(self, kind: str) -> None:
        """Raise where a capture forbids it: in its own thread, in mode "global" in any thread."""
        capture = self.capture
        if capture is None:
            return
        here = threading.current_thread()
        if capture.thread is here or capture.mode == "global":
            raise RuntimeError(
                f"{REFUSED}: {kind} in thread {here.name!r} while {capture.thread.name!r} captures "
                f"in mode {capture.mode!r} @ {where()}"
            )


def where() -> str:
    """File, line and function of the product that asks, "?" where a test does."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/tests/" not in name and "site-packages" not in name:
            for room in ROOMS:
                if room in name:
                    place = f"{room[1:]}{name.rpartition(room)[2]}"
                    return f"{place}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
