"""Publishes KV events on ZeroMQ as vLLM does: a PUB socket, and a ROUTER socket for replay.

Each message is `[topic, number, payload]`, with the number as 8 bytes, big-endian. A reader that
missed batches sends the number of the first missing batch to the ROUTER socket, and gets each batch
of the history from there on, then the number -1 with an empty payload. Knows sockets; knows nothing
of the contents of events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

import zmq
import zmq.asyncio

from arriero.router.kv_events.stream import KvBatch, KvEventStream
from arriero.router.kv_events.vllm_messages import payload

log = logging.getLogger(__name__)

END = (-1).to_bytes(8, "big", signed=True)
"""Number that ends a replay."""
SEND_S = 10.0
"""Seconds after which a reader that does not read its replay is given up."""
LINGER_MS = 100
"""Milliseconds for the last messages at the end."""
HIGH_WATER = 10_000
"""Messages that wait for a slow reader; the reader misses further ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvEventsConfig:
    """Sockets for KV events.

    Attributes:
        publish: address of the PUB socket, such as tcp://127.0.0.1:5557; port 0 picks a free port.
        replay: address of the ROUTER socket for replay; "" for none.
        topic: topic of each message.
    """

    publish: str
    replay: str = ""
    topic: str = ""


class ZmqPublisher:
    """The sockets of a gateway.

    Args:
        config: settings.
        stream: the events.

    Attributes:
        publish, replay: bound addresses; "" before `start`, and without such a socket.
    """

    def __init__(self, config: KvEventsConfig, stream: KvEventStream) -> None:
        self._config = config
        self._stream = stream
        self._topic = config.topic.encode()
        self._context: zmq.asyncio.Context | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._pub: zmq.asyncio.Socket | None = None
        self._number = 0  # of the next batch to send
        self.publish = self.replay = ""

    def start(self) -> None:
        """Bind the sockets.

        Raises:
            OSError: an address cannot be bound.
        """
        context = self._context = zmq.asyncio.Context()
        try:
            self._pub, self.publish = _bind(context, zmq.PUB, self._config.publish)
            self._number = self._stream.number + 1
            self._tasks.append(asyncio.create_task(self._send(self._pub)))
            if self._config.replay:
                router, self.replay = _bind(context, zmq.ROUTER, self._config.replay)
                router.setsockopt(zmq.ROUTER_MANDATORY, 1)
                self._tasks.append(asyncio.create_task(self._answer(router)))
        except OSError:
            self._close()
            raise

    async def stop(self) -> None:
        """Send the last batches, and close the sockets."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._pub is not None:
            await self._send_new(self._pub)
        self._close()

    def _close(self) -> None:
        if self._context is not None:
            self._context.destroy(linger=LINGER_MS)
            self._context = self._pub = None

    async def _send(self, pub: zmq.asyncio.Socket) -> None:
        while not self._stream.closed:
            await self._stream.wait(self._number, SEND_S)
            await self._send_new(pub)

    async def _send_new(self, pub: zmq.asyncio.Socket) -> None:
        """Send each new batch."""
        batches = self._stream.since(self._number)
        if batches is None:  # more batches than the history holds came at once
            batches = self._stream.history()
        for batch in batches:
            self._number = batch.number + 1
            await pub.send_multipart(self._frames(batch))

    async def _answer(self, router: zmq.asyncio.Socket) -> None:
        """Answer requests for replay, one after another."""
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                log.warning("a replay request of %d frames is unreadable", len(frames))
                continue
            reader = frames[:2]
            with contextlib.suppress(TimeoutError, zmq.ZMQError):  # the reader is gone
                async with asyncio.timeout(SEND_S):
                    for batch in self._replayed(int.from_bytes(frames[2], "big")):
                        await router.send_multipart([*reader, *self._frames(batch)])
                    await router.send_multipart([*reader, b"", END, b""])

    def _replayed(self, number: int) -> list[KvBatch]:
        batches = self._stream.since(number)
        if batches is None and number <= self._stream.number:
            batches = self._stream.history()
        return batches or []

    def _frames(self, batch: KvBatch) -> list[bytes]:
        return [self._topic, batch.number.to_bytes(8, "big"), payload(batch)]


def _bind(context: zmq.asyncio.Context, kind: int, address: str) -> tuple[zmq.asyncio.Socket, str]:
    """A bound socket, and its address."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
    bound = socket.getsockopt(zmq.LAST_ENDPOINT)
    return socket, bound.decode().rstrip("\0") if isinstance(bound, bytes) else str(bound)
