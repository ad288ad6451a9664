"""The answer to a call: whole as JSON, or as server-sent events; the same way for every API.

Knows streams of messages and requests; knows nothing of an API's JSON, which an `Encoder` makes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from arriero.router.calls.request_notes import RequestNotes
from arriero.router.http import errors
from arriero.router.http.stream import EventStream, merged, start_stream, until_disconnect
from arriero.router.inference import Stream
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.router.text.constraints import described
from arriero.shards.errors import ArrieroError

log = logging.getLogger(__name__)

Json = dict[str, Any]


class Encoder(Protocol):
    """The messages of one answer in the JSON of an API; numbers tell the answer's calls apart."""

    def encoded(self, number: int, message: Message) -> bytes:
        """Server-sent events of a message; may be empty."""

    def end(self, usages: Sequence[pb.Usage]) -> bytes:
        """The last events of a stream that succeeded."""

    def failed(self, error: Json) -> bytes:
        """The last events of a stream that an error ends; `error` is in OpenAI's shape."""

    def whole(self, messages: Sequence[tuple[int, pb.GenerateResponse]]) -> Json:
        """The answer as a whole."""


async def answer(
    request: Request,
    encoder: Encoder,
    streams: Sequence[Stream],
    notes: RequestNotes,
    *,
    stream: bool,
) -> Response:
    """The response to a request.

    Args:
        request: the request; the end of its connection ends the streams.
        encoder: of the API.
        streams: one for each call, not started.
        notes: of the calls.
        stream: answer in server-sent events.

    Raises:
        ArrieroError: a call is refused, or fails before the first byte of the response.
        ClientGone: the client disconnected before.
    """
    messages = merged(streams)
    if stream:
        first = await until_disconnect(request, start_stream(messages, notes.accepted))
        content = events(first, messages, encoder, request.scope)
        return EventStream(content, first, messages, headers(notes))
    gathered = await until_disconnect(request, gather(messages))
    return JSONResponse(encoder.whole(gathered), headers=headers(notes))


def headers(notes: RequestNotes) -> dict[str, str]:
    """Headers of the answer."""
    if not notes.not_enforced:
        return {}
    return {"x-schema-not-enforced": described(notes.not_enforced)}


async def gather(
    messages: AsyncGenerator[tuple[int, Message]],
) -> list[tuple[int, pb.GenerateResponse]]:
    """All messages."""
    async with aclosing(messages):
        return [
            (number, message.to_wire() if isinstance(message, TextDelta) else message)
            async for number, message in messages
        ]


async def events(
    first: asyncio.Task[tuple[int, Message]],
    messages: AsyncGenerator[tuple[int, Message]],
    encoder: Encoder,
    scope: Any,  # noqa: ANN401  # a starlette scope
) -> AsyncGenerator[bytes]:
    """The stream as events; an error after the first event becomes an event."""
    usages: list[pb.Usage] = []
    state = scope["state"]
    try:
        async with aclosing(messages):
            number, message = await first
            while True:
                if not isinstance(message, TextDelta) and message.HasField("usage"):
                    usages.append(message.usage)
                encoded = encoder.encoded(number, message)
                if encoded:
                    yield encoded
                number, message = await anext(messages)
    except StopAsyncIteration:
        pass
    except ArrieroError as error:
        yield encoder.failed(errors.describe(error, state.get(errors.NAMING, errors.chat_names)))
        return
    except Exception:
        log.exception("request %s failed", state["request_id"])
        yield encoder.failed(errors.internal(state["request_id"]))
        return
    last = encoder.end(usages)
    if last:
        yield last
