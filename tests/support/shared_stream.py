"""A stream of `GenerateMany` as a foreign client drives it, and a connection that can stall."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from arriero.router.client.request_messages import chat_request, generate_request
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from support.eventually import eventually_async

OPTIONS = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 14)]
"""A small window, so that a connection that stalls holds little."""
PATH = "/arriero.v1.Inference/GenerateMany"


def generate(call_id: int, prompt: Any, **fields: Any) -> pb.ManyRequest:  # noqa: ANN401
    return pb.ManyRequest(id=call_id, generate=generate_request(prompt, **fields))


def chat(call_id: int, text: str, **fields: Any) -> pb.ManyRequest:  # noqa: ANN401
    request = chat_request([{"role": "user", "content": text}], **fields)
    return pb.ManyRequest(id=call_id, chat=request)


def cancel(call_id: int) -> pb.ManyRequest:
    return pb.ManyRequest(id=call_id, cancel=pb.CancelCall())


@dataclass
class Answer:
    """The messages of a call, put together."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    ends: dict[int, int] = field(default_factory=dict)
    num_logprobs: int = 0
    start: pb.Start = field(default_factory=pb.Start)
    usage: pb.Usage = field(default_factory=pb.Usage)

    def add(self, message: pb.GenerateResponse) -> None:
        for output in message.outputs:
            self.tokens[output.index] += output.token_ids
            self.text[output.index] += output.text
            self.num_logprobs += len(output.logprobs)
            if output.finish_reason:
                self.ends[output.index] = output.finish_reason
        if message.HasField("start"):
            self.start.CopyFrom(message.start)
        if message.HasField("usage"):
            self.usage.CopyFrom(message.usage)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))


class SharedStream:
    """A stream; a task reads all answers."""

    def __init__(self, channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> None:
        self.call = channel.stream_stream(PATH)(metadata=metadata)
        self.answers: dict[int, Answer] = defaultdict(Answer)
        self.statuses: dict[int, list[pb.CallStatus]] = defaultdict(list)
        self.ended: set[int] = set()
        self.replies: list[pb.ManyReply] = []
        self.error: grpc.aio.AioRpcError | None = None
        self.reader = asyncio.create_task(self._read())

    async def send(self, *requests: pb.ManyRequest | bytes) -> None:
        for request in requests:
            raw = request if isinstance(request, bytes) else request.SerializeToString()
            await self.call.write(raw)

    async def status(self, call_id: int) -> pb.CallStatus:
        """The status of a call that ends once."""
        await eventually_async(lambda: self.statuses[call_id], 30, state=lambda: self.answers)
        (status,) = self.statuses[call_id]
        return status

    async def _read(self) -> None:
        try:
            async for raw in self.call:
                reply = pb.ManyReply.FromString(raw)
                self.replies.append(reply)
                for answer in reply.answers:
                    if answer.HasField("response"):
                        if answer.response.HasField("start"):  # the first of a call
                            self.ended.discard(answer.id)
                        assert answer.id not in self.ended, "an answer after the status"
                        self.answers[answer.id].add(answer.response)
                    if answer.HasField("status"):
                        self.statuses[answer.id].append(answer.status)
                        self.ended.add(answer.id)
        except grpc.aio.AioRpcError as error:
            self.error = error


@asynccontextmanager
async def shared_stream(address: str, *metadata: tuple[str, str]) -> AsyncIterator[SharedStream]:
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stream = SharedStream(channel, *metadata)
        try:
            yield stream
        finally:
            stream.call.cancel()
            await asyncio.gather(stream.reader, return_exceptions=True)


@asynccontextmanager
async def stalling(address: str, running: asyncio.Event) -> AsyncIterator[str]:
    """Address of a proxy that carries bytes to the client only while `running` is set."""
    host, _, port = address.rpartition(":")
    tasks: set[asyncio.Task[None]] = set()

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, stalls: bool
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                if stalls:
                    await running.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        tasks.add(asyncio.create_task(pump(reader, far_writer, stalls=False)))
        tasks.add(asyncio.create_task(pump(far_reader, writer, stalls=True)))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
