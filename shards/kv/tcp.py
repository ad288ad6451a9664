"""Blocks of host memory over TCP, from one rank to a rank of a group on another node.

A reader sends the server's token, then requests blocks by slot and key, for some layers and heads.
Before each block comes a byte that says whether the block is there; after the block comes a byte
that says whether the block stayed unchanged, and the checksums. The requests of a batch go out
before the first block is read. Any error is a missing block.

Unencrypted, as the ranks' other traffic: keys and tokens come over the encrypted links. Knows
sockets and bytes; the leaders know which block is in which slot.
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
"""Number of requested blocks, and half-open ranges of layers and heads in the server's shard."""
_BLOCK = struct.Struct(f"<{KEY_BYTES}sI")
TOKEN_BYTES = 32
CONNECT_S = 1.0
SILENCE_S = 3.0
MAX_BLOCKS = 4096
_YES, _NO = b"\1", b"\0"
_BUFFER_BYTES = 4 << 20


class BlockServer:
    """Serves one rank's host memory, with a thread for each reader.

    Args:
        pool: the memory.
        host: address to listen on.

    Attributes:
        address: "host:port" for readers.
        token: secret that readers must send.
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
        """Stop; readers see a closed connection."""
        with self._lock:
            for connection in (self._listening, *self._readers):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
        for thread in self._threads:
            thread.join()

    def _start(self, work: object, arguments: tuple[object, ...]) -> None:
        assert callable(work)
        thread = threading.Thread(target=work, args=arguments, name="kv-server", daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
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
            log.info("a reader of KV blocks disconnected: %s", error)
        finally:
            with self._lock:
                self._readers.discard(reader)
                reader.close()

    def _answer(self, reader: socket.socket) -> None:
        count, l0, l1, h0, h1 = _HEAD.unpack(_receive(reader, _HEAD.size))
        if count > MAX_BLOCKS:
            raise ValueError(f"request for {count} blocks exceeds the limit of {MAX_BLOCKS}")
        requests = _receive(reader, count * _BLOCK.size)
        for key, slot in _BLOCK.iter_unpack(requests):
            before = self._pool.stamp(key, slot)
            if before is None:
                reader.sendall(_NO)
                continue
            reader.sendall(_YES)
            data = self._pool.data[slot, l0:l1, :, h0:h1]
            reader.sendall(data.reshape(-1).view(torch.uint8).numpy().data)
            complete = _YES if self._pool.stamp(key, slot) == before else _NO
            reader.sendall(complete + self._pool.sums(before)[l0:l1, :, h0:h1].tobytes())


class RemotePart:
    """Reads one peer rank's memory over TCP; see `peer.PeerPart`.

    Args:
        segment: the memory.
        form: format of the blocks.
        part: part of each block to read, within the segment's shard.
    """

    def __init__(self, segment: Segment, form: BlockForm, part: BlockShard) -> None:
        self._segment = segment
        layers, heads = part.within(BlockShard(segment.layers, segment.heads))
        self._range = (layers.start, layers.stop, heads.start, heads.stop)
        self._block = torch.empty(form.shape(part), dtype=form.dtype)
        self._sums_shape = (layers.stop - layers.start, 2, heads.stop - heads.start)
        self._socket: socket.socket | None = None

    def request(self, blocks: Sequence[tuple[bytes, int]]) -> None:
        """Request blocks by key and slot; `get` takes each block, in this order.

        Raises:
            BadBlock: the peer rank cannot be reached.
        """
        try:
            if self._socket is None:
                host, _, port = self._segment.address.rpartition(":")
                self._socket = socket.create_connection((host, int(port)), CONNECT_S)
                self._socket.settimeout(SILENCE_S)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
                self._socket.sendall(self._segment.token)
            head = _HEAD.pack(len(blocks), *self._range)
            self._socket.sendall(head + b"".join(_BLOCK.pack(*block) for block in blocks))
        except OSError as error:
            self.close()
            raise BadBlock(f"rank at {self._segment.address}: {error}") from None

    def get(self, into: Tensor) -> npt.NDArray[np.int64] | None:
        """Copy the next block, [l, 2, h, P, D]; returns its checksums, None for a missing block.

        Raises:
            BadBlock: the peer rank is lost, and all requested blocks with it.
        """
        if self._socket is None:
            raise BadBlock(f"rank at {self._segment.address} is lost")
        try:
            reply = _receive(self._socket, 1)
            if reply != _YES:
                if reply == _NO:
                    return None
                raise ConnectionError(f"invalid reply {reply!r}, expected {_YES!r} or {_NO!r}")
            target = into if into.is_contiguous() else self._block
            view = memoryview(target.reshape(-1).view(torch.uint8).numpy().data)
            _receive_into(self._socket, view)
            complete = _receive(self._socket, 1) == _YES
            sums = _receive(self._socket, SUM_BYTES * math.prod(self._sums_shape))
        except OSError as error:
            self.close()
            raise BadBlock(f"rank at {self._segment.address}: {error}") from None
        if target is not into:
            into.copy_(target)
        return np.frombuffer(sums, dtype="<i8").reshape(self._sums_shape) if complete else None

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
        count = source.recv_into(view, flags=socket.MSG_WAITALL)
        if not count:
            raise ConnectionError("the other side closed the connection")
        view = view[count:]
