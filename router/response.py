"""A request's answer: engine outputs (token ids) to the wire's outputs (text).

Knows samples, text, stop strings and usage; knows nothing of how outputs arrive or leave.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import OutputOptions, ToolOffer
from arriero.router.text.detokenizer import Detokenizer
from arriero.router.text.stop_strings import StopMatcher
from arriero.router.text.text_model import TextModel
from arriero.router.tools import Content, ToolCall, ToolCallParser
from arriero.shards.engine.types import SequenceOutput, TokenLogprobs
from arriero.shards.errors import Unavailable

_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "cancelled": pb.FINISH_REASON_CANCELLED,
}


@dataclass(slots=True)
class TextDelta:
    """A message that says nothing but a piece of one sample's text: all but the first and last.

    There is one for each token, and the wire's own messages cost several times as much to make
    and to read. Read-only once it is out.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str

    def to_wire(self) -> pb.GenerateResponse:
        """The wire's form of it."""
        message = pb.GenerateResponse()
        message.outputs.add(index=self.index, token_ids=self.token_ids, text=self.text)
        return message


Message = pb.GenerateResponse | TextDelta


class Answer:
    """The answer to one request, made message by message.

    Args:
        start: facts for the first message.
        num_prompt: prompt tokens.
        n: samples.
        options: what to send.
        text: the model's text side.
        offer: the tools on offer; None leaves calls in the text.

    Attributes:
        started: a message was made.
        ended: samples that have ended.
    """

    def __init__(
        self,
        start: pb.Start,
        num_prompt: int,
        n: int,
        options: OutputOptions,
        text: TextModel,
        offer: ToolOffer | None = None,
    ) -> None:
        self._start = start
        self._options = options
        self._samples = [_Sample(index, options, text, offer) for index in range(n)]
        self._num_prompt = num_prompt
        self._num_cached = 0
        self.started = False
        self.ended: list[int] = []

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return len(self.ended) == len(self._samples)

    def replay(self, index: int, tokens: Sequence[int], *, finished: bool) -> None:
        """Take in tokens whose messages the client has; before the first `add`."""
        sample = self._samples[index]
        if tokens:
            sample.add(SequenceOutput(request_id="", index=index, tokens=tuple(tokens)))
        sample.finished |= finished
        if sample.finished:
            self.ended.append(index)

    def add(self, outputs: Sequence[SequenceOutput]) -> Message | None:
        """The message for what arrived together, or None when there is nothing to say.

        Raises:
            Unavailable: a sample ended in an error.
        """
        if self.started and len(outputs) == 1:
            sample = self._samples[outputs[0].index]
            if sample.plain and _runs_on(outputs[0]):
                return sample.piece(outputs[0].tokens)
        made: list[pb.Output] = []
        prompt_logprobs: Sequence[TokenLogprobs] | None = None
        for output in outputs:
            if output.finish_reason == "error":
                raise Unavailable(output.error or "the group failed while it computed this")
            if output.num_cached:
                self._num_cached = max(self._num_cached, output.num_cached)
            if output.prompt_logprobs is not None:
                prompt_logprobs = output.prompt_logprobs
            sample = self._samples[output.index]
            was = sample.finished
            message = sample.add(output)
            if message is None:
                continue
            if sample.finished and not was:
                self.ended.append(output.index)
            if len(outputs) > 1:  # a reader that lags gets several steps at once
                before = next((m for m in made if m.index == message.index), None)
                if before is not None:
                    text = before.text + message.text
                    before.MergeFrom(message)  # joins the lists, and takes the later text
                    before.text = text
                    continue
            made.append(message)
        finished = self.finished
        if not made and not finished and prompt_logprobs is None:
            return None
        response = pb.GenerateResponse(outputs=made)
        if not self.started:
            self.started = True
            if prompt_logprobs is not None:
                self._start.prompt_logprobs.extend(map(_position, prompt_logprobs))
            response.start.CopyFrom(self._start)
        if finished:
            response.usage.prompt_tokens = self._num_prompt
            response.usage.cached_tokens = self._num_cached
            response.usage.completion_tokens = sum(s.num_tokens for s in self._samples)
        return response


class _Sample:
    """One of the n samples."""

    __slots__ = (
        "_calls",
        "_detokenizer",
        "_index",
        "_options",
        "_parallel",
        "_stop",
        "finished",
        "num_tokens",
        "plain",
    )

    def __init__(
        self, index: int, options: OutputOptions, text: TextModel, offer: ToolOffer | None
    ) -> None:
        self._index = index
        self._options = options
        self._calls = None if offer is None else ToolCallParser(offer.names)
        self._parallel = offer is None or offer.parallel
        self._detokenizer = Detokenizer(
            text.tokenizer.vocabulary,
            # some forms of calls begin with a special token
            skip_special=options.skip_special_tokens and offer is None,
        )
        self._stop = (
            StopMatcher(options.stop, include=options.include_stop) if options.stop else None
        )
        self.finished = False
        self.num_tokens = 0
        self.plain = self._calls is None and self._stop is None

    def piece(self, tokens: tuple[int, ...]) -> TextDelta | None:
        """As `add`, of a plain sample that runs on."""
        if self.finished:
            return None
        self.num_tokens += len(tokens)
        options = self._options
        text = self._detokenizer.add(tokens) if options.include_text else ""
        if options.include_token_ids and tokens:
            return TextDelta(self._index, tokens, text)
        return TextDelta(self._index, (), text) if text else None

    def add(self, output: SequenceOutput) -> pb.Output | None:
        """The wire's output, or None when it says nothing (or comes after a stop string)."""
        if self.finished:
            return None
        tokens = output.tokens
        reason = output.finish_reason
        stop_string: str | None = None
        text = ""
        if self._options.include_text:
            shown = tokens
            if output.stop_token is not None and not self._options.include_stop:
                shown = tokens[:-1]
            if self._stop is None:
                text = self._detokenizer.add(shown, final=reason is not None)
            else:
                text, taken = self._watch(self._stop, shown, final=reason is not None)
                stop_string = self._stop.stop_string
                if stop_string is not None:
                    reason = "stop"
                    tokens = tokens[:taken]
        self.num_tokens += len(tokens)
        with_ids = self._options.include_token_ids
        message = pb.Output(index=self._index, token_ids=tokens if with_ids else None)
        if self._calls is None:
            message.text = text
        elif self._split(self._calls, text, message, reason):
            reason = "stop"
        if not (
            message.text
            or message.tool_calls
            or reason
            or (tokens and (with_ids or output.logprobs))
        ):
            return None
        if output.logprobs:
            message.logprobs.extend(map(_position, output.logprobs[: len(tokens)]))
        if reason is not None:
            self.finished = True
            message.finish_reason = _REASONS[reason]
            if stop_string is not None:
                message.stop_string = stop_string
            elif output.finish_reason is None:
                return message  # ended by its first call
            elif output.stop_token is not None:
                message.stop_token_id = output.stop_token
        return message

    def _split(
        self, calls: ToolCallParser, text: str, message: pb.Output, reason: str | None
    ) -> bool:
        """Content and calls of `text`, put into `message`; whether a call ends the sample."""
        cut = reason not in (None, "stop")
        for event in calls.add(text, final=reason is not None, cut=cut):
            if isinstance(event, Content):
                message.text += event.text
            elif isinstance(event, ToolCall):
                message.tool_calls.add(
                    id=f"call_{secrets.token_hex(12)}", name=event.name, arguments=event.arguments
                )
                if not self._parallel:
                    return True
            else:
                message.truncated_tool_call = event.text
        return False

    def _watch(self, stop: StopMatcher, tokens: Sequence[int], *, final: bool) -> tuple[str, int]:
        """Text up to a stop string, and how many tokens it took to complete that.

        One token at a time, so that the count does not depend on how tokens arrive.
        """
        text = ""
        for taken, token in enumerate(tokens, 1):
            text += stop.add(self._detokenizer.add((token,)))
            if stop.stop_string is not None:
                return text, taken
        if final:
            text += stop.add(self._detokenizer.add((), final=True), final=True)
        return text, len(tokens)


def _runs_on(output: SequenceOutput) -> bool:
    """Whether it holds nothing but tokens."""
    return (
        output.finish_reason is None
        and output.logprobs is None
        and output.prompt_logprobs is None
        and not output.num_cached
    )


def _position(row: TokenLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(
        chosen=pb.TokenLogprob(token_id=row.token, logprob=row.logprob),
        top=[pb.TokenLogprob(token_id=token, logprob=value) for token, value in row.top],
    )
