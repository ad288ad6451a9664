"""Frames over a byte stream: four bytes of length, little-endian, then the frame.

Each step sends a frame to each gateway while all cores compute, so this is a bare asyncio protocol
and no gRPC stream, whose messages cost each end some 0.2 ms of a core. Knows lengths and sockets;
knows nothing of the content of frames.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

_HEADER = 4
GREETING_BYTES = 4096
"""Largest frame accepted before the peer is authenticated."""
FRAME_BYTES = 1 << 30
"""Largest frame after that; a prompt of ten million tokens has 40 MB."""
_KEEPALIVE = (socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3)


class FramedConnection(asyncio.Protocol):
    """One end of a connection.

    Args:
        on_frame: called with each frame.
        on_closed: called once with the cause when the connection ends; "" for an orderly end.
        limit: bytes of the largest accepted frame; may be changed at any time.

    Attributes:
        on_writable: called when the peer reads again after `full`.
        full: the peer reads too slowly; the buffer for writes is full.
        peer: address of the peer.
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
        """Set keep-alive options on the new connection."""
        self._transport = cast(asyncio.Transport, transport)
        self.peer = str(transport.get_extra_info("peername"))
        # a machine that is gone closes nothing: keep-alive detects the loss within 11 s
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def data_received(self, data: bytes) -> None:
        """Divide received bytes into frames."""
        if not self._buffer and _whole(data):  # the usual case: exactly one frame
            if len(data) - _HEADER > self.limit:
                self._abort_too_large(len(data) - _HEADER)
            else:
                self._on_frame(data[_HEADER:])
            return
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _HEADER and self._transport is not None:
            size = int.from_bytes(self._buffer[at : at + _HEADER], "little")
            if size > self.limit:
                self._abort_too_large(size)
                return
            if len(self._buffer) - at - _HEADER < size:
                break
            frame = bytes(memoryview(self._buffer)[at + _HEADER : at + _HEADER + size])
            at += _HEADER + size
            self._on_frame(frame)
        del self._buffer[:at]

    def pause_writing(self) -> None:
        """The peer reads too slowly."""
        self.full = True

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self.full = False
        self.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end of the connection."""
        self._transport = None
        fault = self._fault or ("" if exc is None else str(exc) or type(exc).__name__)
        self._on_closed(fault)

    def write(self, frame: bytes) -> None:
        """Send a frame; after the end of the connection the frame is dropped."""
        if self._transport is not None:
            self._transport.writelines((len(frame).to_bytes(_HEADER, "little"), frame))

    def close(self) -> None:
        """Close the connection after all written frames are sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self, fault: str) -> None:
        """Close the connection at once.

        Args:
            fault: cause for `on_closed`.
        """
        self._fault = self._fault or fault
        if self._transport is not None:
            self._transport.abort()

    def _abort_too_large(self, size: int) -> None:
        self.abort(f"a frame of {size} bytes exceeds the limit of {self.limit} bytes")


def _whole(data: bytes) -> bool:
    return len(data) >= _HEADER and int.from_bytes(data[:_HEADER], "little") == len(data) - _HEADER
