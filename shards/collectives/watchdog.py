"""A deadline for each wait for another rank: names the stuck collective instead of hanging.

On a GPU a collective is queued, and the thread waits much later, for something else. There each
collective leaves a mark in the device's work, and the first mark that the device does not pass
belongs to the stuck collective.

Knows names, times and how to abort a wait; knows nothing of the collectives themselves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from arriero.shards.errors import CollectiveFailed

_log = logging.getLogger(__name__)


class Mark(Protocol):
    """A point in a device's work."""

    def query(self) -> bool:
        """Whether the device has passed the mark. Thread-safe."""


@dataclass(frozen=True, slots=True)
class _Armed:
    name: str
    step: int
    since: float


class Watchdog:
    """Watches the waits of one thread. The caller sets `step`.

    A wait beyond the limit is logged and ended by `abort`. Whether `abort`, the transport's own
    limit or a lost peer ends the wait, the result is one `CollectiveFailed` with the collective,
    the rank and the step.

    Attributes:
        step: number of the current step.
        marking: collectives leave marks; off while a graph is captured, in which no mark may be
            asked for. The caller then watches each replay.
        progress: count of waits, and of collectives that the device has passed; unchanged while
            neither host nor device makes progress.
        stuck: description of the wait that took too long, or None.
    """

    def __init__(
        self,
        rank: int,
        limit_s: float,
        abort: Callable[[], None] = lambda: None,
        mark: Callable[[], Mark] | None = None,
    ) -> None:
        """Start watching.

        Args:
            rank: rank for the error text.
            limit_s: longest wait in seconds; a longer wait is stuck.
            abort: makes the wait raise; called once, from the watching thread.
            mark: returns a mark after the work queued so far; only where collectives are queued.
        """
        self.step = 0
        self.marking = True
        self.progress = 0
        self.stuck: str | None = None
        self._rank, self._limit_s, self._abort, self._mark = rank, limit_s, abort, mark
        self._armed: _Armed | None = None
        self._queued: deque[tuple[_Armed, Mark]] = deque()
        self._passed_at = 0.0  # time at which the device passed the last mark
        self._expired: _Armed | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def waits_for(self) -> str:
        """The collective that blocks the thread now; "" for none. Thread-safe."""
        armed = self._armed
        if armed is None:
            return ""
        return (self._first_queued() or armed).name

    @property
    def on_device(self) -> bool:
        """Whether what is waited for is on the device's queue, where steps may compute for long."""
        return self._mark is not None and self._armed is not None

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Limit the wait inside the block.

        Raises:
            CollectiveFailed: the wait took too long or was aborted.
        """
        self.progress += 1
        armed = _Armed(name, self.step, time.monotonic())
        self._arm(armed)
        try:
            yield
        except RuntimeError as error:  # all errors of torch.distributed
            wait = self._expired or armed
            text = f"{self.stuck or self._words(wait)}: {_first_line(error)}"
            raise CollectiveFailed(text, wait.name, wait.step) from error
        finally:
            self._arm(None)
        if self.stuck is not None:  # the wait ended after all, but the group knows it as stuck
            wait = self._expired or armed
            raise CollectiveFailed(self.stuck, wait.name, wait.step)
        if self._mark is not None and self.marking:
            self._follow(armed, self._mark())

    def close(self) -> None:
        """Stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _follow(self, armed: _Armed, mark: Mark) -> None:
        with self._changed:
            self._queued.append((armed, mark))
            self._forget_passed()

    def _forget_passed(self) -> None:
        while self._queued and self._queued[0][1].query():
            self._queued.popleft()
            self.progress += 1
            self._passed_at = time.monotonic()

    def _first_queued(self) -> _Armed | None:
        """The first collective that the device has not passed.

        The wait counts from the passed collective before, since the host queues far ahead of the
        device.
        """
        with self._changed:
            try:
                self._forget_passed()
            except RuntimeError:  # the device is broken: the thread that waits gets the error
                return None
            if not self._queued:
                return None
            first = self._queued[0][0]
            return replace(first, since=max(first.since, self._passed_at))

    def _arm(self, armed: _Armed | None) -> None:
        # No notify: the thread checks again when the limit of the last wait has passed. So a stuck
        # wait is detected after one to two limits, and arming costs no wake-up.
        self._armed = armed
        if self._thread is None and armed is not None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                armed = self._first_queued() or self._armed
                left_s = self._limit_s
                if armed is not None:
                    left_s = armed.since + self._limit_s - time.monotonic()
                    if left_s <= 0:
                        break
                self._changed.wait(left_s)
            else:
                return
        self._expired, self.stuck = armed, self._words(armed)
        _log.error("%s", self.stuck)
        try:
            self._abort()
        except RuntimeError as error:  # no abort in this transport: its own limit ends the wait
            _log.warning("the wait cannot be aborted: %s", _first_line(error))

    def _words(self, armed: _Armed) -> str:
        waited = time.monotonic() - armed.since
        verb = "stuck for" if waited >= self._limit_s else "broke off after"
        return f"{armed.name}, rank {self._rank}, step {armed.step}, {verb} {waited:.1f} s"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
