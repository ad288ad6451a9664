"""The attempts of one stream: at which gateway, after which wait, with which request.

A stream that a gateway refused before its start is retried at the same gateway (`Retry`), and at
the next one if the gateway is gone. A stream that broke off is resumed at the next gateway
(`ResumeState`), for a limited time after the last message.
Sans-I/O: `AsyncClient` and `Client` make the calls and wait. Knows messages, errors and addresses;
knows nothing of connections.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from arriero.router.client.resume_state import ResumeState
from arriero.router.client.retry import Retry
from arriero.router.client.status_errors import connection_lost, from_status, no_answer
from arriero.router.proto.arriero.v1 import inference_pb2 as pb

PAUSE_S = 0.1
"""Seconds between the break of a stream and the next attempt."""


class StreamAttempts:
    """Decides the attempts of one stream.

    Args:
        request: of the call; changes when the stream is resumed.
        address: of the gateway for the first attempt.
        discover: returns the current addresses of the gateways.
        retry: attempts before the start of the stream, and the deadline of the call.
        resume_s: seconds after the last message for which a broken stream is resumed.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        request: pb.GenerateRequest | pb.ChatRequest,
        *,
        address: str,
        discover: Callable[[], Sequence[str]],
        retry: Retry,
        resume_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request, self._retry = request, retry
        self._address, self._discover = address, discover
        self._resume_s, self._clock = resume_s, clock
        self._state = ResumeState()
        self._resume_until_s: float | None = None
        self._moves = False

    @property
    def timeout_s(self) -> float | None:
        """Seconds left for the next attempt; None without a deadline."""
        return self._retry.timeout_s

    def new_address(self) -> str | None:
        """Gateway to connect to for the next attempt; None to keep the connection.

        After a break even the same gateway needs a new connection: the broken connection waits
        seconds before it connects again.
        """
        if not self._moves:
            return None
        self._moves = False
        addresses = list(self._discover()) or [self._address]
        known = self._address in addresses
        position = (addresses.index(self._address) + 1) % len(addresses) if known else 0
        self._address = addresses[position]
        return self._address

    def add(self, message: pb.GenerateResponse) -> pb.GenerateResponse:
        """Add a received message; returns the same message."""
        self._resume_until_s = None
        return self._state.add(message)

    def wait_s(self, error: Exception) -> float | None:
        """Seconds to wait before the next attempt, after an attempt that ended in `error`.

        Args:
            error: grpcio's error of the call.

        Returns:
            None when the stream is complete, and only the status of the call is missing.

        Raises:
            Exception: there is no further attempt; the gateway's exception, or else `error`.
        """
        if self._state.finished:
            return None
        cause = from_status(error)
        wait_s = None if self._state.started else self._retry.wait_s(cause)
        if wait_s is not None:
            self._moves = no_answer(error)
            return wait_s
        now_s = self._clock()
        self._resume_until_s = self._resume_until_s or now_s + self._resume_s
        if now_s >= self._resume_until_s or not connection_lost(error):
            raise cause from None
        self._state.fill(self._request)
        self._moves = True
        return PAUSE_S
