"""Server-sent events with ids, from which a stream can be resumed.

The id of an event is the answer's id and the position after the event: of each choice the number of
tokens, with an `f` once the choice has finished: `chatcmpl-1f:17,9f`. The last text and the finish
reason of a choice may be two events; the id of the first has a `t`. The role is an event before the
first text; its id has the position before this text and an `r`. Knows messages and positions;
knows nothing of the JSON inside an event and of the storage of streams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arriero.router.http.answers import Encoder
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.shards.errors import InvalidRequest

Json = dict[str, Any]
_END = b"\n\n"
"""End of a server-sent event; JSON inside an event has no line breaks."""
_ID = re.compile(r"((?:chat)?cmpl-[0-9a-f]{1,64}):(\d{1,9}[ftr]?(?:,\d{1,9}[ftr]?){0,4095})")


@dataclass(frozen=True, order=True, slots=True)
class ChoicePosition:
    """Progress of one choice.

    Attributes:
        tokens: number of tokens.
        finished: the finish reason is sent.
        all_text: all text is sent, and the finish reason is not.
        role: the role is sent, and no text.
    """

    tokens: int = 0
    finished: bool = False
    all_text: bool = False
    role: bool = False

    @property
    def given(self) -> int:
        """Tokens after which a call goes on; the last one again for its finish reason."""
        return max(self.tokens - self.all_text, 0)

    @property
    def before_reason(self) -> ChoicePosition:
        """The position between the last text and the finish reason."""
        return ChoicePosition(self.tokens, all_text=True)

    @property
    def with_role(self) -> ChoicePosition:
        """The position after the role, which comes before the first text."""
        return ChoicePosition(self.tokens, role=True)

    @property
    def without_role(self) -> ChoicePosition:
        """The position at the end of a message: the role is sent with the next one."""
        return replace(self, role=False)

    def __str__(self) -> str:
        mark = "f" if self.finished else "t" if self.all_text else "r" if self.role else ""
        return f"{self.tokens}{mark}"


Position = tuple[ChoicePosition, ...]
"""Progress of an answer, by choice."""


def read_id(event_id: str, num_choices: int | None = None) -> tuple[str, Position]:
    """Answer id and position of an event's id.

    Args:
        event_id: as in the `id:` line of an event.
        num_choices: choices of the answer; None for any number.

    Raises:
        InvalidRequest: the text is no such id.
    """
    match = _ID.fullmatch(event_id)
    if match is None:
        raise InvalidRequest(
            "Last-Event-ID",
            f"`Last-Event-ID`={event_id[:64]!r} is no id of an event; send the `id` of the last "
            "event that was received",
        )
    position = tuple(
        ChoicePosition(int(part.rstrip("ftr")), *(part.endswith(mark) for mark in "ftr"))
        for part in match[2].split(",")
    )
    if num_choices is not None and len(position) != num_choices:
        raise InvalidRequest(
            "Last-Event-ID",
            f"`Last-Event-ID` names {len(position)} choices; the answer has {num_choices}",
        )
    return match[1], position


def parts(message: Message) -> Iterator[tuple[int, Message, ChoicePosition]]:
    """The outputs of a message one by one: sample, message, and progress that the output makes."""
    if isinstance(message, TextDelta):
        yield message.index, message, ChoicePosition(len(message.token_ids))
        return
    for output in message.outputs:
        finished = output.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        part = pb.GenerateResponse(outputs=[output])
        yield output.index, part, ChoicePosition(len(output.token_ids), finished)


def shows(message: Message) -> bool:
    """Whether a part has more than token ids, so that a client gets an event."""
    if isinstance(message, TextDelta):
        return bool(message.text)
    (output,) = message.outputs
    return bool(
        output.text
        or output.tool_calls
        or output.truncated_tool_call
        or output.logprobs
        or output.finish_reason
    )


class Progress:
    """The position of an answer as its messages pass.

    Args:
        start: position before the first message.
        n: samples of each call.
    """

    def __init__(self, start: Position, n: int) -> None:
        self._choices, self._n = list(start), n

    @property
    def position(self) -> Position:
        """The position now."""
        return tuple(self._choices)

    def add(self, number: int, sample: int, made: ChoicePosition) -> int:
        """Add the progress of a part of call `number`; returns the choice."""
        choice = number * self._n + sample
        before = self._choices[choice]
        self._choices[choice] = ChoicePosition(
            before.tokens + made.tokens, before.finished or made.finished
        )
        return choice


def origin(num_choices: int) -> Position:
    """The position before the first token."""
    return (ChoicePosition(),) * num_choices


def reaches(
    messages: Iterable[tuple[int, Message]], start: Position, target: Position, n: int
) -> bool:
    """Whether each choice of `target` lies at the end of a message, so that no message is cut.

    Args:
        messages: from the first token on.
        start: position from which on the messages have all that they say.
        target: the position to find.
        n: samples of each call.
    """
    if any(goal < begun for begun, goal in zip(start, target, strict=True)):
        return False
    progress = Progress(origin(len(target)), n)
    goals = [goal.without_role for goal in target]
    missing = {choice for choice, goal in enumerate(goals) if goal != ChoicePosition()}
    for number, message in messages:
        for sample, _, made in parts(message):
            choice = progress.add(number, sample, made)
            position = progress.position[choice]
            if goals[choice] in (position, position.before_reason if position.finished else None):
                missing.discard(choice)
    return not missing


class NumberedEvents:
    """An encoder whose events have ids; events that the client has are left out.

    Args:
        encoder: makes the events.
        answer_id: id of the answer.
        n: samples of each call.
        received: position up to which the client has the events.
    """

    def __init__(self, encoder: Encoder, answer_id: str, n: int, received: Position) -> None:
        self._encoder, self._id, self._received = encoder, answer_id, received
        self._progress = Progress(origin(len(received)), n)

    def encoded(self, number: int, message: Message) -> bytes:
        """Server-sent events of a message."""
        if not isinstance(message, TextDelta) and message.HasField("start"):
            self._encoder.encoded(number, pb.GenerateResponse(start=message.start))
        events = []
        for sample, part, made in parts(message):
            before = self._progress.position
            choice = self._progress.add(number, sample, made)
            if not shows(part):
                continue
            encoded = self._encoder.encoded(number, part).split(_END)[:-1]
            after = self._progress.position
            for event, position in _numbered(encoded, before[choice], after[choice]):
                if position > self._received[choice]:
                    ids = (*after[:choice], position, *after[choice + 1 :])
                    events.append(b"id: " + self._event_id(ids) + b"\n" + event + _END)
        return b"".join(events)

    def end(self, usages: Sequence[pb.Usage]) -> bytes:
        """The last events of a stream that succeeded."""
        return self._encoder.end(usages)

    def failed(self, error: Json) -> bytes:
        """The last events of a stream that an error ends."""
        return self._encoder.failed(error)

    def whole(self, messages: Sequence[tuple[int, pb.GenerateResponse]]) -> Json:
        """The answer as a whole."""
        return self._encoder.whole(messages)

    def _event_id(self, position: Position) -> bytes:
        return f"{self._id}:{','.join(map(str, position))}".encode("ascii")


def _numbered(
    encoded: Sequence[bytes], before: ChoicePosition, after: ChoicePosition
) -> Iterator[tuple[bytes, ChoicePosition]]:
    """The events of one part of a choice, and the position of each.

    Args:
        encoded: at most three: the role, the text and the finish reason.
        before: position before the part.
        after: position after the part.
    """
    if encoded:
        ends = (after.before_reason, after) if after.finished else (after,)
        yield from zip(encoded, (before.with_role, *ends)[-len(encoded) :], strict=True)
