"""The leader's end of a link: a connection from a gateway, and the gateway's requests.

Knows frames, handles and limits of time and size; knows nothing of the engine or of tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from arriero.router.link import messages as frames
from arriero.router.link.framing import GREETING_BYTES, FramedConnection
from arriero.shards.engine.types import SequenceOutput
from arriero.shards.errors import ArrieroError, ContextTooLong, InvalidRequest, Overloaded

log = logging.getLogger(__name__)

MAX_PENDING = 200_000
"""Largest number of unsent outputs; a gateway that reads too slowly for that is disconnected."""


class GatewayLink:
    """A gateway's connection: requests by handle, and outputs that wait to be written.

    Args:
        on_greeting: called with the first frame.
        on_frame: called with each further frame.
        on_closed: called with the cause when the connection ends; "" for an orderly end.
        greeting_s: seconds after which a connection without a greeting is closed.

    Attributes:
        connection: the connection.
        outputs: pairs of handle and output that wait to be written.
        calls_actions: the peer calls actions (see `leader_rpc`) and sends no requests.
    """

    def __init__(
        self,
        on_greeting: Callable[[GatewayLink, bytes], None],
        on_frame: Callable[[GatewayLink, bytes], None],
        on_closed: Callable[[GatewayLink, str], None],
        greeting_s: float,
    ) -> None:
        self.outputs: list[tuple[int, SequenceOutput]] = []
        self.calls_actions = False
        self.connection = FramedConnection(self._received, self._closed, GREETING_BYTES)
        self.connection.on_writable = self.flush
        self._on_greeting, self._on_frame, self._on_closed = on_greeting, on_frame, on_closed
        self._running: dict[int, list[Any]] = {}  # handle: [request id, samples still running]
        self._greeted = False
        loop = asyncio.get_running_loop()
        self._timeout = loop.call_later(
            greeting_s, self.connection.abort, f"no greeting within {greeting_s:g} s"
        )

    def _received(self, frame: bytes) -> None:
        if self._greeted:
            self._on_frame(self, frame)
        else:
            self._timeout.cancel()
            self._greeted = True
            self._on_greeting(self, frame)

    def _closed(self, cause: str) -> None:
        self._timeout.cancel()
        self._on_closed(self, cause)

    def requests(self) -> list[str]:
        """Ids of the running requests."""
        return [request_id for request_id, _ in self._running.values()]

    def add_request(self, handle: int, request_id: str, samples: int) -> None:
        """Add a request with its number of samples."""
        self._running[handle] = [request_id, samples]

    def drop(self, handle: int) -> str | None:
        """Remove a request; gives the id, or None when the handle is unknown."""
        entry = self._running.pop(handle, None)
        return None if entry is None else entry[0]

    def sample_done(self, handle: int) -> bool:
        """Count a finished sample of a request; True for the last sample."""
        entry = self._running[handle]
        entry[1] -= 1
        if entry[1] <= 0:
            del self._running[handle]
            return True
        return False

    def send(self, frame: list[Any]) -> None:
        """Send a frame."""
        self.connection.write(frames.pack(frame))

    def flush(self) -> None:
        """Write the waiting outputs; steps that pile up behind a slow reader share a frame."""
        if len(self.outputs) > MAX_PENDING:
            self.connection.abort(f"{len(self.outputs)} unread outputs exceed {MAX_PENDING}")
        elif self.outputs and not self.connection.full:
            outputs, self.outputs = self.outputs, []
            self.send(frames.step_frame(outputs))

    def refuse(self, handle: int, error: Exception) -> None:
        """Refuse a request with the cause."""
        if isinstance(error, ArrieroError):
            self.send(["refused", handle, *_refusal(error)])
            return
        log.error("submit failed", exc_info=error)
        self.send(["refused", handle, "Unavailable", f"the engine failed: {error}", None])


def _refusal(error: ArrieroError) -> list[Any]:
    if isinstance(error, InvalidRequest):
        kind = "ContextTooLong" if isinstance(error, ContextTooLong) else "InvalidRequest"
        return [kind, str(error), error.field]
    if isinstance(error, Overloaded):
        return ["Overloaded", str(error), error.retry_after_s]
    return ["Unavailable", str(error), None]
