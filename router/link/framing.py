"""Frames over a stream of bytes: four bytes of length, little-endian, then the frame.

A frame a step and gateway goes through here while all cores compute, so it is a bare protocol of
asyncio's and not a gRPC stream, which costs each end some 0.2 ms of a core a message. Knows
lengths and sockets; knows nothing of what is in a frame.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

_HEADER = 4
GREETING_BYTES = 4096
"""The longest frame that is taken from whoever has not been let in."""
FRAME_BYTES = 1 << 30
"""The longest frame after that: a prompt of ten million tokens is 40 MB."""
_KEEPALIVE = (socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3)


class FramedConnection(asyncio.Protocol):
    """One end of a connection.

    Args:
        on_frame: called with each frame.
        on_closed: called once, when the connection is over: why, "" for an orderly end.
        limit: bytes of the longest frame that is taken; may be changed.
    """

    def __init__(
        self,
        on_frame: Callable[[bytes], None],
        on_closed: Callable[[str], None],
        limit: int = FRAME_BYTES,
    ) -> None:
        self.limit = limit
        self.on_writable: Callable[[], None] = lambda: None
        self.full = False
        self.peer = ""
        self._on_frame, self._on_closed = on_frame, on_closed
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._fault = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        self._transport = cast(asyncio.Transport, transport)
        self.peer = str(transport.get_extra_info("peername"))
        # whose machine is gone sends no end; it is found out within 11 s
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def data_received(self, data: bytes) -> None:
        """Cut what came into frames."""
        if not self._buffer and _whole(data):  # as nearly always: one frame, alone
            if len(data) - _HEADER > self.limit:
                self.abort(f"a frame of {len(data) - _HEADER} bytes; the most is {self.limit}")
            else:
                self._on_frame(data[_HEADER:])
            return
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _HEADER and self._transport is not None:
            size = int.from_bytes(self._buffer[at : at + _HEADER], "little")
            if size > self.limit:
                self.abort(f"a frame of {size} bytes; the most is {self.limit}")
                return
            if len(self._buffer) - at - _HEADER < size:
                break
            frame = bytes(memoryview(self._buffer)[at + _HEADER : at + _HEADER + size])
            at += _HEADER + size
            self._on_frame(frame)
        del self._buffer[:at]

    def pause_writing(self) -> None:
        """The other side reads slowly."""
        self.full = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self.full = False
        self.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._transport = None
        fault = self._fault or ("" if exc is None else str(exc) or type(exc).__name__)
        self._on_closed(fault)

    def write(self, frame: bytes) -> None:
        """Send a frame; what is sent after the end is dropped."""
        if self._transport is not None:
            self._transport.writelines((len(frame).to_bytes(_HEADER, "little"), frame))

    def close(self) -> None:
        """End it once what was written is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self, fault: str) -> None:
        """End it at once.

        Args:
            fault: what `on_closed` is told.
        """
        self._fault = self._fault or fault
        if self._transport is not None:
            self._transport.abort()


def _whole(data: bytes) -> bool:
    return len(data) >= _HEADER and int.from_bytes(data[:_HEADER], "little") == len(data) - _HEADER
