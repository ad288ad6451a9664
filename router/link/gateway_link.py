"""The leader's end of a link: a connection from a gateway, and the gateway's requests.

Knows frames, handles and limits of time and size; knows nothing of the engine or of tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from arriero.router.link import messages as frames
from arriero.router.link.framing import GREETING_BYTES, FramedConnection
from arriero.shards.engine.types import SequenceOutput
from arriero.shards.errors import ArrieroError, Unavailable
from arriero.shards.protocol import wire

log = logging.getLogger(__name__)

MAX_PENDING = 200_000
"""Largest number of unsent outputs; a gateway that reads too slowly for that is disconnected."""


@dataclass(slots=True)
class _Running:
    """A request of the gateway, with the number of samples that still run."""

    request_id: str
    num_samples: int


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
        self._running: dict[int, _Running] = {}  # by handle
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
        return [running.request_id for running in self._running.values()]

    def add_request(self, handle: int, request_id: str, samples: int) -> None:
        """Add a request with its number of samples."""
        self._running[handle] = _Running(request_id, samples)

    def drop(self, handle: int) -> str | None:
        """Remove a request; gives the id, or None when the handle is unknown."""
        entry = self._running.pop(handle, None)
        return None if entry is None else entry.request_id

    def sample_done(self, handle: int) -> bool:
        """Count a finished sample of a request; True for the last sample."""
        entry = self._running[handle]
        entry.num_samples -= 1
        if entry.num_samples <= 0:
            del self._running[handle]
            return True
        return False

    def send(self, message: frames.LeaderMessage | frames.ActionMessage) -> None:
        """Send a message."""
        self.connection.write(wire.encode(message))

    def flush(self) -> None:
        """Write the waiting outputs; steps that pile up behind a slow reader share a frame."""
        if len(self.outputs) > MAX_PENDING:
            self.connection.abort(f"{len(self.outputs)} unread outputs exceed {MAX_PENDING}")
        elif self.outputs and not self.connection.full:
            outputs, self.outputs = self.outputs, []
            self.send(frames.Step.of(outputs))

    def refuse(self, handle: int, error: Exception) -> None:
        """Refuse a request with the cause."""
        if not isinstance(error, ArrieroError):
            log.error("submit failed", exc_info=error)
            error = Unavailable(f"the engine failed: {error}")
        self.send(frames.Refused.of(handle, error))
