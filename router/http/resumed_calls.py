"""The calls that go on with an answer another gateway began.

A call gets the tokens that its client has (`Resumed`). Tokens that nobody noted are computed again,
by the same call cut off at that length. Knows calls, tokens and encoders; knows nothing of events
and archives.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from arriero.router.calls.conversation import read_offer
from arriero.router.calls.request_notes import RequestNotes
from arriero.router.http.completion_calls import Call, CompletionCalls, begin
from arriero.router.http.numbered_events import Position, parts
from arriero.router.inference import Inference, Stream
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import read_options
from arriero.router.response import Answer, Message, TextDelta
from arriero.router.tenants.admission_controller import Caller
from arriero.shards.engine.types import SequenceOutput, TokenLogprobs
from arriero.shards.errors import Unavailable


@dataclass(frozen=True, kw_only=True, slots=True)
class CallStart:
    """Facts of a call's first message: digest of the weights, and numbers of prompt tokens."""

    weights: str
    prompt_tokens: int
    cached_tokens: int

    @classmethod
    def of(cls, start: pb.Start) -> CallStart:
        """The facts of a message."""
        return cls(
            weights=start.weights,
            prompt_tokens=start.prompt_tokens,
            cached_tokens=start.cached_tokens,
        )


def token_ids(message: Message) -> Sequence[int]:
    """The tokens of a part of a message; see `numbered_events.parts`."""
    if isinstance(message, TextDelta):
        return message.token_ids
    return list(message.outputs[0].token_ids)


async def given_tokens(
    inference: Inference,
    calls: CompletionCalls,
    caller: Caller,
    starts: Sequence[CallStart | None],
    received: Position,
    noted: Sequence[Sequence[int]],
) -> list[list[int]]:
    """The tokens up to `received`, by choice.

    Args:
        inference: computes tokens that are not in `noted`.
        calls: of the answer.
        caller: the client.
        starts: of each call; None for a call without a message.
        received: position of the client.
        noted: known tokens of each choice, perhaps fewer or more than `received`.

    Raises:
        ArrieroError: as `Inference.chat`.
    """
    given = [list(tokens[: place.given]) for tokens, place in zip(noted, received, strict=True)]
    for number, call in enumerate(calls.calls):
        choices = range(number * calls.n, (number + 1) * calls.n)
        if all(len(given[choice]) == received[choice].given for choice in choices):
            continue
        most = max(received[choice].given for choice in choices)
        cut = copy.deepcopy(call)
        cut.sampling.max_tokens = most
        if cut.sampling.HasField("min_tokens"):
            cut.sampling.min_tokens = min(cut.sampling.min_tokens, most)
        _resume(cut, starts[number], [(given[choice], False) for choice in choices])
        stream = await begin(inference, cut, caller, RequestNotes())
        async with aclosing(stream):
            async for message in stream:
                for sample, part, _ in parts(message):
                    given[choices[sample]] += token_ids(part)
        for choice in choices:
            del given[choice][received[choice].given :]
            if len(given[choice]) < received[choice].given:
                raise Unavailable("the answer cannot be resumed; send the request again")
    return given


async def streams(
    inference: Inference,
    calls: CompletionCalls,
    caller: Caller,
    starts: Sequence[CallStart | None],
    received: Position,
    given: Sequence[Sequence[int]],
    notes: RequestNotes,
) -> list[Stream]:
    """The stream of the rest of each call.

    Args:
        inference: runs the calls.
        calls: of the answer.
        caller: the client.
        starts: of each call; None for a call without a message.
        received: position of the client.
        given: the tokens up to `received`.
        notes: of the calls.

    Raises:
        ArrieroError: as `Inference.chat`.
    """
    rest = []
    for number, call in enumerate(calls.calls):
        choices = range(number * calls.n, (number + 1) * calls.n)
        start = starts[number]
        if start is not None and all(received[choice].finished for choice in choices):
            count = sum(received[choice].tokens for choice in choices)
            rest.append(_usage_alone(start, count))
            notes.admitted()
            continue
        _resume(call, start, [(given[choice], received[choice].finished) for choice in choices])
        rest.append(await begin(inference, call, caller, notes))
    return rest


def replay(
    calls: CompletionCalls, received: Position, given: Sequence[Sequence[int]]
) -> list[tuple[int, Message]]:
    """The messages of the tokens that the client has, each with the number of its call.

    The messages bring an encoder to its state at `received`; log-probabilities stand there as 0.
    """
    messages: list[tuple[int, Message]] = []
    for number, call in enumerate(calls.calls):
        offer = read_offer(call) if isinstance(call, pb.ChatRequest) else None
        start = pb.Start()
        if isinstance(call, pb.GenerateRequest):
            start.prompt_token_ids.extend(call.token_ids.ids)
        answer = Answer(start, 0, calls.n, read_options(call.options), calls.text, offer)
        for sample in range(calls.n):
            choice = number * calls.n + sample
            tokens = tuple(given[choice])
            rows = None
            if call.sampling.HasField("logprobs"):
                rows = tuple(TokenLogprobs(token=token, logprob=0.0) for token in tokens)
            output = SequenceOutput(request_id="", index=sample, tokens=tokens, logprobs=rows)
            message = answer.add([output]) if tokens else None
            if message is not None:
                if received[choice].finished:
                    message = message.to_wire() if isinstance(message, TextDelta) else message
                    message.outputs[0].finish_reason = pb.FINISH_REASON_STOP
                messages.append((number, message))
    return messages


def _resume(
    call: Call, start: CallStart | None, samples: Sequence[tuple[Sequence[int], bool]]
) -> None:
    """Make a call go on after tokens; each sample with its tokens and whether it has finished."""
    if start is None or not any(tokens or finished for tokens, finished in samples):
        return
    call.resumed.Clear()
    call.resumed.weights = start.weights
    for index, (tokens, finished) in enumerate(samples):
        call.resumed.samples.add(index=index, token_ids=tokens, finished=finished)


async def _usage_alone(start: CallStart, num_output: int) -> AsyncGenerator[Message]:
    """The stream of a call whose samples have all finished: the last message, without outputs."""
    message = pb.GenerateResponse()
    message.usage.prompt_tokens = start.prompt_tokens
    message.usage.cached_tokens = start.cached_tokens
    message.usage.completion_tokens = num_output
    yield message
