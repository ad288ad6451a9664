"""Answers of `arriero.v1.Inference` as answers of VllmEngine. Sans-I/O.

A stream has a chunk for each step with new tokens of a sample, and a `complete` after the sample's
last chunk; without a stream there are the `complete`s alone. Knows both messages; knows nothing of
connections.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from smg_grpc_proto import vllm_engine_pb2 as vllm

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta

_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "abort",
    pb.FINISH_REASON_CONTENT_FILTER: "abort",
}


class EngineAnswer:
    """The answer to a request, message by message.

    Args:
        request: the request.
    """

    def __init__(self, request: vllm.GenerateRequest) -> None:
        params = request.sampling_params
        self._stream = request.stream
        self._with_logprobs = params.HasField("logprobs")
        self._samples = [_Sample(index) for index in range(max(1, params.n))]
        self._prompt_ids: Sequence[int] = request.tokenized.input_ids
        self._num_prompt = 0
        self._num_cached = 0
        self._prompt_logprobs: vllm.InputLogProbs | None = None

    def add(self, message: Message) -> list[vllm.GenerateResponse]:
        """The messages for a message of the inference path."""
        if isinstance(message, TextDelta):
            sample = self._samples[message.index]
            return self._chunk(sample, message.token_ids, ())
        if message.HasField("start"):
            self._begin(message.start)
        answers = []
        for output in message.outputs:
            sample = self._samples[output.index]
            answers += self._chunk(sample, output.token_ids, output.logprobs)
            if output.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
                answers.append(self._complete(sample, output))
        return answers

    def abort(self) -> list[vllm.GenerateResponse]:
        """The last messages of an aborted request, for each sample that has not ended."""
        end = pb.Output(finish_reason=pb.FINISH_REASON_CANCELLED)
        return [self._complete(sample, end) for sample in self._samples if not sample.ended]

    def _begin(self, start: pb.Start) -> None:
        self._num_prompt, self._num_cached = start.prompt_tokens, start.cached_tokens
        if start.prompt_logprobs:
            self._prompt_logprobs = _prompt_logprobs(self._prompt_ids, start.prompt_logprobs)

    def _chunk(
        self, sample: _Sample, tokens: Sequence[int], logprobs: Iterable[pb.PositionLogprobs]
    ) -> list[vllm.GenerateResponse]:
        """Take in new tokens; gives a chunk in a stream."""
        sample.tokens += tokens
        rows = list(logprobs)
        _extend(sample.logprobs, rows)
        if not (self._stream and tokens):
            return []
        chunk = vllm.GenerateStreamChunk(
            token_ids=tokens,
            prompt_tokens=self._num_prompt,
            completion_tokens=len(sample.tokens),
            cached_tokens=self._num_cached,
            index=sample.index,
        )
        if rows:
            _extend(chunk.output_logprobs, rows)
        if self._prompt_logprobs is not None and not sample.index and not sample.began:
            chunk.input_logprobs.CopyFrom(self._prompt_logprobs)
        sample.began = True
        return [vllm.GenerateResponse(chunk=chunk)]

    def _complete(self, sample: _Sample, output: pb.Output) -> vllm.GenerateResponse:
        sample.ended = True
        complete = vllm.GenerateComplete(
            output_ids=sample.tokens,
            finish_reason=_REASONS[output.finish_reason],
            prompt_tokens=self._num_prompt,
            completion_tokens=len(sample.tokens),
            cached_tokens=self._num_cached,
            index=sample.index,
        )
        if self._with_logprobs:
            complete.output_logprobs.CopyFrom(sample.logprobs)
        if self._prompt_logprobs is not None:
            complete.input_logprobs.CopyFrom(self._prompt_logprobs)
        stopped_by = output.WhichOneof("stopped_by")
        if stopped_by == "stop_token_id":
            complete.matched_token_id = output.stop_token_id
        elif stopped_by == "stop_string":
            complete.matched_stop_str = output.stop_string
        return vllm.GenerateResponse(complete=complete)


class _Sample:
    """What was sent of a sample."""

    __slots__ = ("began", "ended", "index", "logprobs", "tokens")

    def __init__(self, index: int) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.logprobs = vllm.OutputLogProbs()
        self.began = self.ended = False


def _extend(logprobs: vllm.OutputLogProbs, rows: Iterable[pb.PositionLogprobs]) -> None:
    for row in rows:
        logprobs.token_logprobs.append(row.chosen.logprob)
        logprobs.token_ids.append(row.chosen.token_id)
        logprobs.top_logprobs.append(_top(row))


def _prompt_logprobs(
    prompt: Sequence[int], rows: Sequence[pb.PositionLogprobs]
) -> vllm.InputLogProbs:
    """Log-probabilities of the prompt; its first token has none, and an empty entry."""
    logprobs = vllm.InputLogProbs()
    if len(prompt) == len(rows) + 1:
        logprobs.token_ids.append(prompt[0])
        logprobs.token_logprobs.add()
        logprobs.top_logprobs.add()
    for row in rows:
        logprobs.token_ids.append(row.chosen.token_id)
        logprobs.token_logprobs.add(value=row.chosen.logprob)
        logprobs.top_logprobs.append(_top(row))
    return logprobs


def _top(row: pb.PositionLogprobs) -> vllm.TopLogProbs:
    return vllm.TopLogProbs(
        values=[token.logprob for token in row.top],
        token_ids=[token.token_id for token in row.top],
    )
