"""Streams over HTTP that a client resumes, at the same gateway or at another.

A client asks with the header `x-resumable: 1`; each event then has an id (`numbered_events`). The
gateway keeps the stream for a while after its connection broke. Another gateway reads the body,
the seed and the tokens of the answer from the archive, lets a group compute the tokens that came
after the last note (the same tokens, by the contract of the engine), and goes on from the id that
the client names. Knows answers, the archive and times; knows nothing of the JSON inside an event.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response

from arriero.router.calls.request_notes import RequestNotes
from arriero.router.http import answers, resumed_calls
from arriero.router.http.completion_calls import CompletionCalls, begin, chat_calls, text_calls
from arriero.router.http.numbered_events import (
    NumberedEvents,
    Position,
    Progress,
    origin,
    parts,
    reaches,
    read_id,
)
from arriero.router.http.request_schemas import ChatBody, CompletionBody
from arriero.router.http.responses_api.store import Archive, Key
from arriero.router.http.stream import EventStream, merged, start_stream, until_disconnect
from arriero.router.inference import Inference
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.router.resumable_streams import ResumableStreams
from arriero.router.tenants.admission_controller import Caller, is_set
from arriero.shards.errors import InvalidRequest, NotFound

NOTE_S = 0.5
"""Seconds between two notes of a stream's tokens in the archive."""
NOTE_LIMIT_S = 2.0
MAX_NOTES = 4 * 10_000
HEADER = "x-resumable"

Numbered = tuple[int, Message]
T = TypeVar("T")


@dataclass(kw_only=True)
class AnswerRecord:
    """What another gateway needs to go on with an answer; archived as JSON.

    Attributes:
        chat: whether the body is that of a conversation.
        body: body of the request, as JSON text.
        head: common fields of the chunks, the id among them.
        seeds: of each call.
        starts: of each call, once its first message came: weights and numbers of prompt tokens.
        until: seconds since 1970 up to which the answer can be resumed; moves on with each note.
    """

    chat: bool
    body: str
    head: dict[str, Any]
    seeds: list[int]
    starts: list[resumed_calls.CallStart | None]
    until: float = 0.0

    def to_bytes(self) -> bytes:
        """The record for the archive."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, value: bytes) -> AnswerRecord:
        """A record of the archive."""
        fields = json.loads(value)
        starts = [s and resumed_calls.CallStart(**s) for s in fields.pop("starts")]
        return cls(**fields, starts=starts)


@dataclass
class _RunningAnswer:
    """The tokens of an answer as they come."""

    key: Key
    record: AnswerRecord
    progress: Progress
    tokens: list[list[int]]
    replayed: list[Numbered] = field(default_factory=list)
    noted_s: float = field(default_factory=time.monotonic)


class LocalArchive:
    """The archive of a gateway without others: the latest records, in memory."""

    def __init__(self) -> None:
        self._values: OrderedDict[Key, bytes] = OrderedDict()

    async def put(self, key: Key, value: bytes) -> None:
        """Keep a record."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > MAX_NOTES:
            self._values.popitem(last=False)

    async def get(self, key: Key) -> bytes | None:
        """A record; None when it is not kept."""
        return self._values.get(key)

    async def delete(self, key: Key) -> None:
        """Forget a record."""
        self._values.pop(key, None)


class ResumableAnswers:
    """The resumable answers of a gateway.

    Args:
        inference: runs the calls.
        archive: what all gateways know; None for this gateway alone.
        keep_s: seconds for which a stream is kept without its client, and after its end; 0 refuses
            resumable streams.
    """

    def __init__(self, inference: Inference, archive: Archive | None, keep_s: float) -> None:
        self._inference = inference
        self._archive: Archive = LocalArchive() if archive is None else archive
        self._keep_s = keep_s
        self._streams: ResumableStreams[Numbered] = ResumableStreams()
        self._starts: dict[Key, Position] = {}
        """Where the streams begin that this gateway took over; others begin at the first token."""
        self._notes: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Cancel all streams."""
        await self._streams.close()

    def continues(self, request: Request) -> bool:
        """Whether a request names the last event that its client has."""
        return bool(request.headers.get("last-event-id"))

    def wants(self, request: Request) -> bool:
        """Whether a request asks for a resumable stream.

        Raises:
            InvalidRequest: this gateway has none.
        """
        if not is_set(request.headers.get(HEADER, "")):
            return False
        if not self._keep_s:
            raise InvalidRequest(
                HEADER,
                f"`{HEADER}`: this gateway keeps no streams (`gateway.resumable_s` is 0); leave "
                "the header out",
                "unsupported_parameter",
            )
        return True

    async def start(self, request: Request, calls: CompletionCalls, *, chat: bool) -> Response:
        """The stream of a new answer.

        Raises:
            ArrieroError: as `Inference.chat`, or the limit of stored streams is reached.
        """
        for call in calls.calls:
            if not call.sampling.HasField("seed") or call.sampling.seed == -1:
                call.sampling.seed = secrets.randbits(63)
            call.options.include_token_ids = True
        head = calls.encoder.head
        record = AnswerRecord(
            chat=chat,
            body=(await request.body()).decode(),
            head=head,
            seeds=[call.sampling.seed for call in calls.calls],
            starts=[None] * len(calls.calls),
        )
        caller: Caller = request.state.caller
        notes = RequestNotes(num_calls=len(calls.calls))
        streams = [await begin(self._inference, call, caller, notes) for call in calls.calls]
        begun = origin(len(calls.calls) * calls.n)
        key = (caller.tenant.name, head["id"])
        tokens: list[list[int]] = [[] for _ in begun]
        answer = _RunningAnswer(key, record, Progress(begun, calls.n), tokens)
        kept = self._streams.keep(answer.key, self._noted(answer, merged(streams)), self._keep_s)
        encoder = NumberedEvents(calls.encoder, head["id"], calls.n, begun)
        return await self._respond(request, kept, encoder, notes)

    async def resume(self, request: Request, answer_id: str = "") -> Response:
        """The rest of an answer, after the id of the header `Last-Event-ID`.

        Args:
            request: of the same tenant as the answer's.
            answer_id: id of the answer; "" for the id in the header.

        Raises:
            NotFound: the tenant has no such answer, or it is no longer kept.
            InvalidRequest: the header holds no id of an event of this answer.
        """
        event_id = request.headers.get("last-event-id", "")
        named = read_id(event_id)[0] if event_id else answer_id
        if answer_id and named != answer_id:
            raise InvalidRequest(
                "Last-Event-ID", f"`Last-Event-ID` is of {named!r}, the path of {answer_id[:64]!r}"
            )
        caller: Caller = request.state.caller
        key = (caller.tenant.name, named)
        record = await self._record(key)
        calls = await self._calls(request, record)
        begun = origin(len(calls.calls) * calls.n)
        received = read_id(event_id, len(begun))[1] if event_id else begun
        stored = self._streams.stored(key)
        start = self._starts.get(key, begun)
        if stored is not None and reaches(stored, start, received, calls.n):
            kept = self._streams.attach(key, 0)
            encoder = NumberedEvents(calls.encoder, named, calls.n, received)
            notes = RequestNotes(num_calls=0)
            notes.accepted.set()
            return await self._respond(request, kept, encoder, notes)
        self._streams.drop(key)
        return await self._go_on(request, key, record, calls, received)

    async def _go_on(
        self,
        request: Request,
        key: Key,
        record: AnswerRecord,
        calls: CompletionCalls,
        received: Position,
    ) -> Response:
        """Go on with an answer that another gateway began."""
        caller: Caller = request.state.caller
        noted = await self._archive.get(_tokens_key(key))
        tokens = [[]] * len(received) if noted is None else json.loads(noted)["tokens"]
        work = resumed_calls.given_tokens(
            self._inference, calls, caller, record.starts, received, tokens
        )
        given = await until_disconnect(request, work)
        notes = RequestNotes(num_calls=len(calls.calls))
        streams = await resumed_calls.streams(
            self._inference, calls, caller, record.starts, received, given, notes
        )
        replayed = resumed_calls.replay(calls, received, given)
        answer = _RunningAnswer(key, record, Progress(received, calls.n), given, replayed)
        kept = self._streams.keep(key, self._noted(answer, merged(streams)), self._keep_s)
        self._starts = {k: at for k, at in self._starts.items() if self._streams.stored(k)}
        self._starts[key] = received
        encoder = NumberedEvents(calls.encoder, key[1], calls.n, received)
        return await self._respond(request, kept, encoder, notes)

    async def _respond(
        self,
        request: Request,
        kept: AsyncGenerator[Numbered],
        encoder: NumberedEvents,
        notes: RequestNotes,
    ) -> Response:
        first = await until_disconnect(request, start_stream(kept, notes.accepted))
        content = answers.events(first, kept, encoder, request.scope)
        headers = answers.headers(notes) | {HEADER: f"{self._keep_s:g}"}
        return EventStream(content, first, kept, headers)

    async def _record(self, key: Key) -> AnswerRecord:
        value = await self._archive.get(key)
        if value is not None:
            record = AnswerRecord.from_bytes(value)
            noted = await self._archive.get(_tokens_key(key))
            until = 0.0 if noted is None else float(json.loads(noted)["until"])
            if time.time() < max(record.until, until):
                return record
        raise NotFound(
            f"no answer {key[1][:64]!r} can be resumed; answers are kept for {self._keep_s:g} s; "
            "send the request again",
            field="id",
            code="answer_not_found",
        )

    async def _calls(self, request: Request, record: AnswerRecord) -> CompletionCalls:
        """The calls of an archived answer, with the same seeds."""
        body = json.loads(record.body)
        if record.chat:
            calls = await chat_calls(
                ChatBody.model_validate(body), request, self._inference, record.head
            )
        else:
            calls = await text_calls(
                CompletionBody.model_validate(body), request, self._inference, record.head
            )
        for call, seed in zip(calls.calls, record.seeds, strict=True):
            call.sampling.seed = seed
            call.options.include_token_ids = True
        return calls

    async def _noted(
        self, answer: _RunningAnswer, messages: AsyncGenerator[Numbered]
    ) -> AsyncGenerator[Numbered]:
        """The messages, replayed ones first; notes the tokens in the archive as they come."""
        replayed = answer.replayed
        async with aclosing(messages):
            async for number, message in messages:
                if not isinstance(message, TextDelta):
                    await self._note_facts(answer, number, message)
                for item in replayed:  # not before the group has taken the rest of the answer
                    yield item
                replayed = []
                for sample, part, made in parts(message):
                    choice = answer.progress.add(number, sample, made)
                    answer.tokens[choice] += resumed_calls.token_ids(part)
                if time.monotonic() - answer.noted_s > NOTE_S:
                    self._note(answer)
                yield number, message
        self._note(answer)

    async def _note_facts(
        self, answer: _RunningAnswer, number: int, message: pb.GenerateResponse
    ) -> None:
        """Note what the first message of a call says, and complete the last."""
        starts = answer.record.starts
        if message.HasField("start"):
            if starts[number] is None:
                starts[number] = resumed_calls.CallStart.of(message.start)
            # before the first event: whoever has an id can resume
            answer.record.until = time.time() + self._keep_s
            await _within(self._archive.put(answer.key, answer.record.to_bytes()))
        start = starts[number]
        if message.HasField("usage") and start is not None and answer.replayed:
            message.usage.cached_tokens = start.cached_tokens  # those of the call that began

    def _note(self, answer: _RunningAnswer) -> None:
        """Note the tokens so far, without a wait for the archive."""
        answer.noted_s = time.monotonic()
        value = {"tokens": answer.tokens, "until": time.time() + self._keep_s}
        note = self._archive.put(_tokens_key(answer.key), json.dumps(value).encode())
        task = asyncio.create_task(_within(note))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)


def _tokens_key(key: Key) -> Key:
    return key[0], f"{key[1]}/tokens"


async def _within(note: Awaitable[None]) -> None:
    """Wait for a note, but not long: an archive that stands still must not hold up the stream."""
    with suppress(TimeoutError):
        await asyncio.wait_for(note, NOTE_LIMIT_S)
