"""The answer to a request: turns the engine's outputs (token ids) into messages (text).

Knows samples, text, stop strings and usage; knows nothing of the transport of outputs or messages.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from arriero.router.calls.conversation import ToolOffer
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import OutputOptions
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
    """A message with new text and tokens of one sample, and nothing else.

    All messages but the first and the last are usually text deltas, one for each token; protobuf
    messages cost several times as much to make and to read. Read-only after its creation.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str

    def to_wire(self) -> pb.GenerateResponse:
        """The protobuf message."""
        message = pb.GenerateResponse()
        self.add_to(message)
        return message

    def add_to(self, message: pb.GenerateResponse) -> None:
        """Put the delta into an empty message."""
        message.outputs.add(index=self.index, token_ids=self.token_ids, text=self.text)


Message = pb.GenerateResponse | TextDelta


class Answer:
    """Makes the messages of an answer.

    Args:
        start: facts for the first message.
        num_prompt: number of prompt tokens.
        n: number of samples.
        options: contents of the answer.
        text: tokenizer and texts of the model.
        offer: the tools on offer; None leaves calls in the text.
        num_writable: prompt tokens that are in the prefix cache after the call.

    Attributes:
        started: the first message was made.
        ended: indices of the samples that have ended.
    """

    def __init__(
        self,
        start: pb.Start,
        num_prompt: int,
        n: int,
        options: OutputOptions,
        text: TextModel,
        offer: ToolOffer | None = None,
        *,
        num_writable: int = 0,
    ) -> None:
        self._start = start
        self._num_writable = num_writable
        self._options = options
        self._samples = [_Sample(index, options, text, offer) for index in range(n)]
        self._num_prompt = num_prompt
        self._num_cached = 0
        self._num_drafted = self._num_accepted = 0
        self.started = False
        self.ended: list[int] = []

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return len(self.ended) == len(self._samples)

    def replay(self, index: int, tokens: Sequence[int], *, finished: bool) -> None:
        """Take in tokens that the client already has; call before the first `add`."""
        sample = self._samples[index]
        if tokens:
            sample.add(SequenceOutput(request_id="", index=index, tokens=tuple(tokens)))
        sample.finished |= finished
        if sample.finished:
            self.ended.append(index)

    def add(self, outputs: Sequence[SequenceOutput]) -> Message | None:
        """The message for outputs that arrived together; None when there is nothing to send.

        Raises:
            Unavailable: a sample ended in an error.
        """
        if self.started and len(outputs) == 1:
            sample = self._samples[outputs[0].index]
            if sample.plain and _tokens_only(outputs[0]):
                if outputs[0].num_drafted and not sample.finished:
                    self._count_drafts(outputs[0], len(outputs[0].tokens))
                return sample.add_plain(outputs[0].tokens)
        messages: list[pb.Output] = []
        prompt_logprobs: Sequence[TokenLogprobs] | None = None
        for output in outputs:
            if output.finish_reason == "error":
                raise Unavailable(output.error or "the group failed during the request")
            if output.num_cached:
                self._num_cached = max(self._num_cached, output.num_cached)
            if output.prompt_logprobs is not None:
                prompt_logprobs = output.prompt_logprobs
            sample = self._samples[output.index]
            was_finished, num_before = sample.finished, sample.num_tokens
            message = sample.add(output)
            if output.num_drafted and not was_finished:
                self._count_drafts(output, sample.num_tokens - num_before)
            if message is None:
                continue
            if sample.finished and not was_finished:
                self.ended.append(output.index)
            if len(outputs) > 1:  # a slow reader gets several steps at once
                before = next((m for m in messages if m.index == message.index), None)
                if before is not None:
                    text = before.text + message.text
                    shifted = [at + len(before.text) for at in message.tool_call_offsets]
                    del message.tool_call_offsets[:]
                    before.MergeFrom(message)  # joins the lists, overwrites the text
                    before.tool_call_offsets.extend(shifted)
                    before.text = text
                    continue
            messages.append(message)
        finished = self.finished
        if not messages and not finished and prompt_logprobs is None:
            return None
        response = pb.GenerateResponse(outputs=messages)
        if not self.started:
            self.started = True
            if prompt_logprobs is not None:
                self._start.prompt_logprobs.extend(map(_position, prompt_logprobs))
            self._start.prompt_tokens = self._num_prompt
            self._start.cached_tokens = self._num_cached
            self._start.written_tokens = max(0, self._num_writable - self._num_cached)
            response.start.CopyFrom(self._start)
        if finished:
            response.usage.prompt_tokens = self._num_prompt
            response.usage.cached_tokens = self._num_cached
            response.usage.written_tokens = max(0, self._num_writable - self._num_cached)
            response.usage.completion_tokens = sum(s.num_tokens for s in self._samples)
            response.usage.accepted_prediction_tokens = self._num_accepted
            response.usage.rejected_prediction_tokens = self._num_drafted - self._num_accepted
        return response

    def _count_drafts(self, output: SequenceOutput, num_taken: int) -> None:
        """Count a step's drafts; right ones after a stop string are no part of the output."""
        self._num_drafted += output.num_drafted
        self._num_accepted += min(output.num_accepted, num_taken)


class _Sample:
    """A sample of the answer."""

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
            # some models begin a call with a special token
            skip_special=options.skip_special_tokens and offer is None,
        )
        self._stop = (
            StopMatcher(options.stop, include=options.include_stop) if options.stop else None
        )
        self.finished = False
        self.num_tokens = 0
        self.plain = self._calls is None and self._stop is None

    def add_plain(self, tokens: tuple[int, ...]) -> TextDelta | None:
        """As `add`, for tokens alone of a sample without stop strings and tools."""
        if self.finished:
            return None
        self.num_tokens += len(tokens)
        options = self._options
        text = self._detokenizer.add(tokens) if options.include_text else ""
        if options.include_token_ids and tokens:
            return TextDelta(self._index, tokens, text)
        return TextDelta(self._index, (), text) if text else None

    def add(self, output: SequenceOutput) -> pb.Output | None:
        """The output message; None when it is empty or the sample has ended.

        Text ends with the last whole character: bytes that a limit cut off within a character are
        no text, as in other gateways' answers. Token ids hold them.
        """
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
                text = self._detokenizer.add(shown)
            else:
                text, taken = self._match_stop(self._stop, shown, final=reason is not None)
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
                return message  # the first call ended the sample
            elif output.stop_token is not None:
                message.stop_token_id = output.stop_token
        return message

    def _split(
        self, calls: ToolCallParser, text: str, message: pb.Output, reason: str | None
    ) -> bool:
        """Put the content and calls of `text` into `message`; true when a call ends the sample."""
        cut = reason not in (None, "stop")
        for event in calls.add(text, final=reason is not None, cut=cut):
            if isinstance(event, Content):
                message.text += event.text
            elif isinstance(event, ToolCall):
                message.tool_call_offsets.append(len(message.text))
                message.tool_calls.add(
                    id=f"call_{secrets.token_hex(12)}", name=event.name, arguments=event.arguments
                )
                if not self._parallel:
                    return True
            else:
                message.truncated_tool_call = event.text
        return False

    def _match_stop(
        self, stop: StopMatcher, tokens: Sequence[int], *, final: bool
    ) -> tuple[str, int]:
        """Text up to a stop string, and the number of tokens up to the end of the stop string.

        Adds one token at a time, so the count does not depend on the grouping of tokens.
        """
        text = ""
        for taken, token in enumerate(tokens, 1):
            text += stop.add(self._detokenizer.add((token,)))
            if stop.stop_string is not None:
                return text, taken
        if final:
            text += stop.add("", final=True)
        return text, len(tokens)


def _tokens_only(output: SequenceOutput) -> bool:
    """Whether an output holds nothing but tokens."""
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
