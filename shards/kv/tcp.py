"""Blocks of host memory over TCP, from one rank to a rank of a group on another node.

A reader shows the server's token, then asks for blocks by slot and key, of the layers and heads
that it needs; each comes after a byte that says whether it is there, and before one that says
whether it was there to the end, with its checksums. Requests of a batch go out before the first
block is read. Whatever goes wrong is a missing block.

In the clear, as the ranks' other traffic is: keys and tokens travel over the links. Knows sockets
and bytes; what is where is the leaders'.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import math
import secrets
import socket
import struct
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.shards.kv.block_shards import BadBlock, BlockForm, BlockShard
from arriero.shards.kv.checksums import SUM_BYTES
from arriero.shards.kv.host import HostPool
from arriero.shards.kv.transfers import KEY_BYTES, Segment

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<IHHHH")
"""Blocks asked for, and half-open ranges of layers and heads inside the server's piece."""
_BLOCK = struct.Struct(f"<{KEY_BYTES}sI")
TOKEN_BYTES = 32
CONNECT_S = 1.0
SILENCE_S = 3.0
MAX_BLOCKS = 4096
_YES, _NO = b"\1", b"\0"
_BUFFER_BYTES = 4 << 20


class BlockServer:
    """Serves one rank's host memory; a thread for each reader.

    Args:
        pool: the memory.
        host: address to listen on.

    Attributes:
        address: "host:port" that readers connect to.
        token: what they must show.
    """

    def __init__(self, pool: HostPool, host: str) -> None:
        self._pool = pool
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._listening = socket.create_server((host, 0))
        self.address = f"{host}:{self._listening.getsockname()[1]}"
        self._lock = threading.Lock()
        self._readers: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept, ())

    def close(self) -> None:
        """End; readers see their connection end."""
        with self._lock:
            for one in (self._listening, *self._readers):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
        for thread in self._threads:
            thread.join()

    def _start(self, work: object, arguments: tuple[object, ...]) -> None:
        assert callable(work)
        thread = threading.Thread(target=work, args=arguments, name="kv-server", daemon=True)
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                reader, _ = self._listening.accept()
            except OSError:
                return
            with self._lock:
                if self._listening.fileno() < 0:
                    reader.close()
                    return
                self._readers.add(reader)
            self._start(self._serve, (reader,))

    def _serve(self, reader: socket.socket) -> None:
        try:
            reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            if not hmac.compare_digest(_receive(reader, TOKEN_BYTES), self.token):
                return
            while True:
                self._answer(reader)
        except (OSError, ValueError) as error:
            log.info("a reader of KV blocks is gone: %s", error)
        finally:
            with self._lock:
                self._readers.discard(reader)
                reader.close()

    def _answer(self, reader: socket.socket) -> None:
        count, l0, l1, h0, h1 = _HEAD.unpack(_receive(reader, _HEAD.size))
        if count > MAX_BLOCKS:
            raise ValueError(f"{count} blocks asked for at once")
        asked = _receive(reader, count * _BLOCK.size)
        for key, slot in _BLOCK.iter_unpack(asked):
            before = self._pool.stamp(key, slot)
            if before is None:
                reader.sendall(_NO)
                continue
            reader.sendall(_YES)
            data = self._pool.data[slot, l0:l1, :, h0:h1]
            reader.sendall(data.reshape(-1).view(torch.uint8).numpy().data)
            whole = _YES if self._pool.stamp(key, slot) == before else _NO
            reader.sendall(whole + self._pool.sums(before)[l0:l1, :, h0:h1].tobytes())


class RemotePart:
    """The reader's end of one rank's memory.

    Args:
        segment: the memory.
        form: of blocks.
        part: what is wanted of each block: a part of the segment's own piece.
    """

    def __init__(self, segment: Segment, form: BlockForm, part: BlockShard) -> None:
        self._segment = segment
        layers, heads = part.within(BlockShard(segment.layers, segment.heads))
        self._range = (layers.start, layers.stop, heads.start, heads.stop)
        self._block = torch.empty(form.shape(part), dtype=form.dtype)
        self._sums_shape = (layers.stop - layers.start, 2, heads.stop - heads.start)
        self._socket: socket.socket | None = None

    def ask(self, wanted: Sequence[tuple[bytes, int]]) -> None:
        """Send for blocks, by key and slot; each is then taken by `get`, in this order.

        Raises:
            BadBlock: the rank is not there.
        """
        try:
            if self._socket is None:
                host, _, port = self._segment.address.rpartition(":")
                self._socket = socket.create_connection((host, int(port)), CONNECT_S)
                self._socket.settimeout(SILENCE_S)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
                self._socket.sendall(self._segment.token)
            head = _HEAD.pack(len(wanted), *self._range)
            self._socket.sendall(head + b"".join(_BLOCK.pack(*one) for one in wanted))
        except OSError as error:
            self.close()
            raise BadBlock(f"rank at {self._segment.address}: {error}") from None

    def get(self, into: Tensor) -> npt.NDArray[np.int64] | None:
        """Copy the next block, [l, 2, h, P, D]; gives its checksums, None when it is not there.

        Raises:
            BadBlock: the rank is lost; nothing more comes of what was asked.
        """
        if self._socket is None:
            raise BadBlock(f"rank at {self._segment.address} is lost")
        try:
            there = _receive(self._socket, 1)
            if there != _YES:
                if there == _NO:
                    return None
                raise ConnectionError("it answers what is no answer")
            target = into if into.is_contiguous() else self._block
            view = memoryview(target.reshape(-1).view(torch.uint8).numpy().data)
            _receive_into(self._socket, view)
            whole = _receive(self._socket, 1) == _YES
            sums = _receive(self._socket, SUM_BYTES * math.prod(self._sums_shape))
        except OSError as error:
            self.close()
            raise BadBlock(f"rank at {self._segment.address}: {error}") from None
        if target is not into:
            into.copy_(target)
        return np.frombuffer(sums, dtype="<i8").reshape(self._sums_shape) if whole else None

    def close(self) -> None:
        """Drop the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _receive(source: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    _receive_into(source, memoryview(data))
    return bytes(data)


def _receive_into(source: socket.socket, view: memoryview) -> None:
    while len(view):
        got = source.recv_into(view, flags=socket.MSG_WAITALL)
        if not got:
            raise ConnectionError("it closed the connection")
        view = view[got:]
