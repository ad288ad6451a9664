"""A deadline around each wait for another rank: names what is stuck instead of hanging.

On a GPU a collective is queued, and the thread that queued it waits much later, for something else:
there each one leaves a mark in the device's work, and the first mark that the device does not come
past is the collective that is stuck.

Knows names, times and how to break off a wait; knows nothing of what is waited for.
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
        """Whether the device is past it. Safe from any thread."""


@dataclass(frozen=True, slots=True)
class _Armed:
    name: str
    step: int
    since: float


class Watchdog:
    """Watches one thread's waits. `step` is set by whoever runs the steps.

    A wait past its limit is logged and broken off by `abort`; whether that ends it, or the
    transport's own limit does, or the peer is gone, what comes out is one `CollectiveFailed` that
    names the collective, the rank and the step.

    Attributes:
        step: the one that runs.
        moves: counts waits up, and collectives that the device has passed; it stands still while
            neither gets on.
        stuck: words of the wait that took too long, or None.
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
            rank: this one, for the message.
            limit_s: a wait longer than that is stuck.
            abort: called once from the watching thread; is to make the wait raise.
            mark: where collectives are queued: the point after what was queued so far.
        """
        self.step = 0
        self.moves = 0
        self.stuck: str | None = None
        self._rank, self._limit_s, self._abort, self._mark = rank, limit_s, abort, mark
        self._armed: _Armed | None = None
        self._queued: deque[tuple[_Armed, Mark]] = deque()
        self._passed_at = 0.0  # when the device was last found past a mark
        self._found: _Armed | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def waits_for(self) -> str:
        """The collective that is waited in now; "" for none. Safe from any thread."""
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
            CollectiveFailed: it took too long, or broke off.
        """
        self.moves += 1
        armed = _Armed(name, self.step, time.monotonic())
        self._arm(armed)
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are that
            at = self._found or armed
            text = f"{self.stuck or self._words(at)}: {_first_line(error)}"
            raise CollectiveFailed(text, at.name, at.step) from error
        finally:
            self._arm(None)
        if self.stuck is not None:  # it went on after all, but the group was told
            at = self._found or armed
            raise CollectiveFailed(self.stuck, at.name, at.step)
        if self._mark is not None:
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
            self.moves += 1
            self._passed_at = time.monotonic()

    def _first_queued(self) -> _Armed | None:
        """The first collective that the device is not past; it is waited for since the one before.

        The host queues far ahead of the device.
        """
        with self._changed:
            try:
                self._forget_passed()
            except RuntimeError:  # the device is broken: who waits for it hears that
                return None
            if not self._queued:
                return None
            first = self._queued[0][0]
            return replace(first, since=max(first.since, self._passed_at))

    def _arm(self, armed: _Armed | None) -> None:
        # no notify: the thread looks again when the limit of what it saw last has passed, so a
        # wait is found stuck after one limit and at most two, and arming costs no wake-up
        self._armed = armed
        if self._thread is None and armed is not None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                armed = self._first_queued() or self._armed
                due = self._limit_s
                if armed is not None:
                    due = armed.since + self._limit_s - time.monotonic()
                    if due <= 0:
                        break
                self._changed.wait(due)
            else:
                return
        self._found, self.stuck = armed, self._words(armed)
        _log.error("%s", self.stuck)
        try:
            self._abort()
        except RuntimeError as error:  # a transport that cannot: its own limit ends the wait
            _log.warning("the wait cannot be broken off: %s", _first_line(error))

    def _words(self, armed: _Armed) -> str:
        waited = time.monotonic() - armed.since
        verb = "stuck for" if waited >= self._limit_s else "broke off after"
        return f"{armed.name}, rank {self._rank}, step {armed.step}, {verb} {waited:.1f} s"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
