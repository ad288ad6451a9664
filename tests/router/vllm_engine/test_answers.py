"""Answers of the inference path become chunks and completes of VllmEngine."""

from __future__ import annotations

import pytest

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed: arriero[smg]")

from smg_grpc_proto import vllm_engine_pb2 as vllm

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.router.vllm_engine.answers import EngineAnswer


def answer_to(*, stream: bool = True, **sampling: object) -> EngineAnswer:
    return EngineAnswer(
        vllm.GenerateRequest(
            tokenized=vllm.TokenizedInput(input_ids=[1, 2, 3]),
            sampling_params=vllm.SamplingParams(**sampling),
            stream=stream,
        )
    )


def run(answer: EngineAnswer, messages: list[Message]) -> list[vllm.GenerateResponse]:
    return [sent for message in messages for sent in answer.add(message)]


FIRST = pb.GenerateResponse(
    start=pb.Start(prompt_tokens=3, cached_tokens=2), outputs=[pb.Output(index=0, token_ids=[9])]
)
LAST = pb.GenerateResponse(
    outputs=[
        pb.Output(index=0, token_ids=[8, 2], finish_reason=pb.FINISH_REASON_STOP, stop_token_id=2)
    ],
    usage=pb.Usage(),
)


def test_a_stream_has_new_ids_and_one_complete() -> None:
    sent = run(answer_to(), [FIRST, TextDelta(0, (7,), ""), LAST])
    chunks = [message.chunk for message in sent[:-1]]
    assert [list(chunk.token_ids) for chunk in chunks] == [[9], [7], [8, 2]]
    assert [chunk.completion_tokens for chunk in chunks] == [1, 2, 4]
    assert {(chunk.prompt_tokens, chunk.cached_tokens) for chunk in chunks} == {(3, 2)}
    assert sent[-1].complete == vllm.GenerateComplete(
        output_ids=[9, 7, 8, 2], finish_reason="stop", prompt_tokens=3, completion_tokens=4,
        cached_tokens=2, index=0, matched_token_id=2,
    )  # fmt: skip


def test_without_a_stream_there_is_the_complete_alone() -> None:
    (sent,) = run(answer_to(stream=False), [FIRST, LAST])
    assert list(sent.complete.output_ids) == [9, 8, 2]


def test_each_sample_has_its_complete() -> None:
    messages = [
        pb.GenerateResponse(
            start=pb.Start(prompt_tokens=3),
            outputs=[pb.Output(index=1, token_ids=[5]), pb.Output(index=0, token_ids=[6])],
        ),
        pb.GenerateResponse(
            outputs=[
                pb.Output(
                    index=0, finish_reason=pb.FINISH_REASON_STOP, stop_string="x", token_ids=[4]
                )
            ]
        ),
        pb.GenerateResponse(
            outputs=[pb.Output(index=1, token_ids=[4], finish_reason=pb.FINISH_REASON_LENGTH)]
        ),
    ]
    sent = run(answer_to(n=2), messages)
    completes = {m.complete.index: m.complete for m in sent if m.HasField("complete")}
    assert list(completes[0].output_ids) == [6, 4] and completes[0].matched_stop_str == "x"
    assert list(completes[1].output_ids) == [5, 4] and completes[1].finish_reason == "length"
    assert completes[1].WhichOneof("matched_stop") is None


def test_log_probabilities() -> None:
    def row(token: int) -> pb.PositionLogprobs:
        top = [pb.TokenLogprob(token_id=token, logprob=-0.5), pb.TokenLogprob(token_id=0)]
        return pb.PositionLogprobs(chosen=top[0], top=top)

    start = pb.Start(prompt_tokens=3, prompt_logprobs=[row(2), row(3)])
    messages = [
        pb.GenerateResponse(
            start=start, outputs=[pb.Output(index=0, token_ids=[9], logprobs=[row(9)])]
        ),
        pb.GenerateResponse(
            outputs=[
                pb.Output(
                    index=0, token_ids=[8], logprobs=[row(8)],
                    finish_reason=pb.FINISH_REASON_LENGTH,
                )
            ]
        ),
    ]  # fmt: skip
    sent = run(answer_to(logprobs=2, prompt_logprobs=1), messages)
    first, second, end = sent
    assert list(first.chunk.output_logprobs.token_ids) == [9]
    assert list(first.chunk.output_logprobs.top_logprobs[0].token_ids) == [9, 0]
    assert list(second.chunk.output_logprobs.token_logprobs) == [-0.5]
    assert list(end.complete.output_logprobs.token_ids) == [9, 8]
    prompt = first.chunk.input_logprobs
    assert list(prompt.token_ids) == [1, 2, 3]
    assert [entry.HasField("value") for entry in prompt.token_logprobs] == [False, True, True]
    assert not second.chunk.HasField("input_logprobs")
    assert end.complete.input_logprobs == prompt
    # nobody asked: nothing is sent
    (plain,) = run(answer_to(stream=False), [FIRST, LAST])
    assert not plain.complete.HasField("output_logprobs")


def test_an_abort_ends_what_has_not_ended() -> None:
    answer = answer_to(n=2)
    run(answer, [FIRST, LAST])
    (sent,) = answer.abort()
    assert (sent.complete.index, sent.complete.finish_reason) == (1, "abort")
