"""Streams of the simulated device: work in order within a stream, between streams by waits alone.

Everything runs at once here, so that a forgotten wait gives right numbers; on a GPU it would not.
So each stream has a clock (what it is known to come after), and each memory notes its last uses. A
use that may overtake an earlier use of another stream is an error: a read before the write has run,
a write before a read has, and new memory on a stream that a freed tensor of this stream still lends
to another stream. In a capture, a stream must join the capturing stream and come back to it.

Host threads are not compared: the KV cache is one memory here, and threads use different blocks.
Knows streams, events and memory; knows nothing of ops. A tensor counts as a whole.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet, WeakValueDictionary

from support.fake_cuda.ledger import Ledger, where

Clock = dict[int, int]
"""Number of uses of each stream that come before."""


class UnorderedStreams(AssertionError):
    """Work of two streams that no wait puts in order, or a capture that a stream does not join."""


@dataclass(frozen=True, slots=True)
class Use:
    """A use of memory: the op, and when it is on its stream's clock."""

    stream: int
    tick: int
    thread: int
    op: str


class Memory:
    """The memory of a tensor and its views; it returns to its stream's pool when they are gone."""

    def __init__(self, streams: Streams, home: int) -> None:
        self.streams, self.home = streams, home
        self.written: Use | None = None
        self.reads: dict[int, Use] = {}

    @property
    def uses(self) -> list[Use]:
        """The last write, and the reads since."""
        return [*([self.written] if self.written else []), *self.reads.values()]

    def __del__(self) -> None:
        self.streams.free(self)


class Stream:
    """Work in order. Made by `torch.cuda.Stream`, and one for the default stream."""

    numbers = itertools.count()

    def __init__(self, device: object = None, priority: int = 0, **more: object) -> None:
        """Of any device."""
        self.number = next(Stream.numbers)
        self.clock: Clock = {}

    def wait_stream(self, other: Stream) -> None:
        """What is queued next here comes after all that `other` has queued."""
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        """What is queued next here comes after the event."""
        streams().join_capture(self, event)
        merge(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        streams().ledger.event("stream.synchronize")
        streams().host_waits(self.clock)


class Event:
    """A point of a stream, which the device has always passed: it has no time of its own."""

    def __init__(self, enable_timing: bool = False, **more: object) -> None:
        self.at_s = 0.0
        self.clock: Clock = {}
        self.captured = False

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or streams().current
        self.at_s = time.perf_counter()
        self.clock, self.captured = dict(stream.clock), streams().captures(stream)

    def query(self) -> bool:
        """True, but nothing counts as known from it: elsewhere it may be False."""
        streams().ledger.refuse("cudaEventQuery")
        return True

    def synchronize(self) -> None:
        streams().ledger.event("event.synchronize")
        streams().host_waits(self.clock)

    def elapsed_time(self, other: Event) -> float:
        return (other.at_s - self.at_s) * 1e3

    def wait(self, stream: Stream | None = None) -> None:
        """On the device; the host goes on."""
        (stream or streams().current).wait_event(self)


class Streams:
    """The streams of one simulated device, and who has used which memory."""

    in_place: Streams | None = None

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, ledger.streams = ledger, self
        self.default = Stream()
        self._local = threading.local()
        self._host: Clock = {}
        self._queued: Clock = {}
        self._memories: WeakValueDictionary[int, Memory] = WeakValueDictionary()
        self._freed: dict[int, list[Use]] = {}
        self._joined: dict[int, Stream] = {}
        self._capturing: int | None = None
        self._touched: WeakSet[Memory] = WeakSet()

    @property
    def current(self) -> Stream:
        """The current stream of this thread."""
        stream: Stream = getattr(self._local, "current", self.default)
        return stream

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """As `torch.cuda.stream`."""
        before = self.current
        self._local.current = stream or before
        try:
            yield
        finally:
            self._local.current = before

    def host_waits(self, clock: Clock | None = None) -> None:
        """The host knows the device past a clock: of the current stream where none is given."""
        merge(self._host, self.current.clock if clock is None else clock)

    def host_waits_for_all(self) -> None:
        """As `torch.cuda.synchronize`."""
        merge(self._host, self._queued)

    # ---- memory ----

    def memory(self, address: int) -> Memory:
        """The memory at an address; new memory comes from the current stream's pool.

        Raises:
            UnorderedStreams: another stream may still use what the pool gives out.
        """
        memory = self._memories.get(address)
        if memory is None:
            stream = self.current
            for use in self._freed.pop(stream.number, ()):
                self._require(use, stream, "the memory of a freed tensor is given out")
            memory = self._memories[address] = Memory(self, stream.number)
            memory.written = self._now(stream, "allocation")
        return memory

    def free(self, memory: Memory) -> None:
        """Memory returns to its pool."""
        away = [use for use in memory.uses if use.stream != memory.home]
        if away:
            self._freed.setdefault(memory.home, []).extend(away)

    def use(self, reads: Iterable[Memory], writes: Iterable[Memory], op: str) -> None:
        """Queue an op on the current stream.

        Raises:
            UnorderedStreams: an earlier use of another stream may not have run by then.
        """
        stream = self.current
        if self._in_capture and stream.number not in self._joined:
            raise UnorderedStreams(f"{op} on a stream that is no part of the capture @ {where()}")
        now = self._now(stream, op)
        for memory in reads:
            if memory.written is not None:
                self._require(memory.written, stream, f"{op} reads")
            memory.reads[stream.number] = now
            self._note(memory)
        for memory in writes:
            for use in memory.uses:
                self._require(use, stream, f"{op} writes")
            memory.written, memory.reads = now, {}
            self._note(memory)

    def _now(self, stream: Stream, op: str) -> Use:
        tick = stream.clock.get(stream.number, 0) + 1
        stream.clock[stream.number] = self._queued[stream.number] = tick
        return Use(stream.number, tick, threading.get_ident(), op)

    def _require(self, use: Use, stream: Stream, act: str) -> None:
        known = max(stream.clock.get(use.stream, 0), self._host.get(use.stream, 0))
        if known < use.tick and use.thread == threading.get_ident():
            raise UnorderedStreams(
                f"{act} without a wait for {use.op} of another stream @ {where()}"
            )

    # ---- captures ----

    @property
    def _in_capture(self) -> bool:
        return self._capturing == threading.get_ident()

    def captures(self, stream: Stream) -> bool:
        """Whether the stream is part of this thread's capture."""
        return self._in_capture and stream.number in self._joined

    def join_capture(self, stream: Stream, event: Event) -> None:
        """A wait: takes the stream into the capture, where the event is in it.

        Raises:
            UnorderedStreams: a captured stream waits for something outside of the capture.
        """
        if not self._in_capture:
            return
        if event.captured:
            self._joined[stream.number] = stream
        elif stream.number in self._joined:
            raise UnorderedStreams(f"a capture waits for an event outside of it @ {where()}")

    @contextmanager
    def capturing(self) -> Iterator[list[Memory]]:
        """Capture on a stream of its own; gives a list that has all used memory in the end.

        Raises:
            UnorderedStreams: a stream that joined did not come back.
        """
        self.host_waits_for_all()  # as a capture begins
        origin = Stream()
        origin.clock = dict(self._host)
        touched: list[Memory] = []
        self._joined, self._capturing = {origin.number: origin}, threading.get_ident()
        self._touched = WeakSet()
        try:
            with self.on(origin):
                yield touched
        finally:
            joined, self._joined, self._capturing = self._joined, {}, None
        for stream in joined.values():
            if origin.clock.get(stream.number, 0) < stream.clock.get(stream.number, 0):
                raise UnorderedStreams("a captured stream has work that no wait joins to the end")
            merge(self._host, stream.clock)
        touched += self._touched

    def _note(self, memory: Memory) -> None:
        if self._in_capture:
            self._touched.add(memory)


def merge(clock: Clock, other: Clock) -> None:
    """Come after all that `other` comes after, too."""
    for stream, tick in other.items():
        if clock.get(stream, 0) < tick:
            clock[stream] = tick


def streams() -> Streams:
    """Of the device that is in place."""
    assert Streams.in_place is not None, "no simulated device is in place"
    return Streams.in_place
