"""SIGINT (Ctrl-C), SIGTERM and SIGHUP during work that must not be cut in half.

Knows signals; knows nothing of the work. Outside of the main thread, which alone gets signals, the
functions do nothing.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DOUBLE_S = 1.0
"""Seconds within which a second signal is the same wish: people press Ctrl-C twice."""


class Interrupts:
    """Turns signals into exceptions: SIGINT into KeyboardInterrupt, others into SystemExit.

    The exit code is 128 plus the number of the signal, as shells have it.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._at_s = 0.0

    def handle(self, number: int, frame: object) -> None:
        """Handler of a signal.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SystemExit: for the other signals.
        """
        now_s = time.monotonic()
        if self._error is not None and now_s - self._at_s < _DOUBLE_S:
            return
        interrupt = number == signal.SIGINT
        self._error = KeyboardInterrupt() if interrupt else SystemExit(128 + number)
        self._at_s = now_s
        raise self._error

    def check(self) -> None:
        """Raise again what a library's callback has swallowed; call outside of clean-ups."""
        if self._error is not None:
            raise self._error


def install(handler: Callable[[int, Any], None]) -> None:
    """Take the signals back from a library that has set handlers of its own: Ray's end the process.

    Does nothing outside of the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)


@contextlib.contextmanager
def handled(handler: Any) -> Iterator[None]:  # noqa: ANN401
    """Use a handler for the signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old_handlers = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old_handler in old_handlers.items():
            signal.signal(number, old_handler)


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Ignore the signals during a clean-up of a few seconds."""
    with handled(lambda number, frame: None):  # not SIG_IGN, which new processes would inherit
        yield


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold the signals back, and hand the first on at the end of the block."""
    pending: list[int] = []
    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.getsignal(number) for number in SIGNALS
    }
    with handled(lambda number, frame: pending.append(number)):
        yield
    if pending:
        handler = before[pending[0]]
        if callable(handler):
            handler(pending[0], None)
        elif handler == signal.SIG_DFL:
            signal.raise_signal(pending[0])
