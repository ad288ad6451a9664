"""Requests of VllmEngine become requests of the inference path, field by field."""

from __future__ import annotations

import pytest

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed: arriero[smg]")

from smg_grpc_proto import vllm_engine_pb2 as vllm

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.vllm_engine.requests import inference_request
from arriero.shards.errors import InvalidRequest


def request(**sampling: object) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id="r1",
        tokenized=vllm.TokenizedInput(input_ids=[5, 6, 7]),
        sampling_params=vllm.SamplingParams(**sampling),
    )


def sampling_of(**sampling: object) -> pb.SamplingParams:
    return inference_request(request(**sampling), "m", 100).sampling


def test_defaults_of_the_protocol_apply_and_no_others() -> None:
    ours = inference_request(request(), "m", 100)
    assert (ours.model, ours.request_id, list(ours.token_ids.ids)) == ("m", "r1", [5, 6, 7])
    sampling = ours.sampling
    # every field that a checkpoint's defaults could fill is set
    expected = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1,
    }  # fmt: skip
    for name, value in expected.items():
        assert sampling.HasField(name), name
        assert getattr(sampling, name) == value, name
    for name in ("max_tokens", "seed", "logprobs", "prompt_logprobs", "structured"):
        assert not sampling.HasField(name), name
    assert not ours.options.include_text


def test_every_sampling_field_is_passed_on() -> None:
    sampling = sampling_of(
        temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, frequency_penalty=0.3,
        presence_penalty=-0.1, repetition_penalty=1.1, max_tokens=9, min_tokens=2,
        stop_token_ids=[3, 4], ignore_eos=True, n=3, logprobs=5, prompt_logprobs=0, seed=-7,
        logit_bias={11: 1.5},
    )  # fmt: skip
    # numbers are the ones that the caller wrote, not their nearest float32
    assert sampling == pb.SamplingParams(
        temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, frequency_penalty=0.3,
        presence_penalty=-0.1, repetition_penalty=1.1, max_tokens=9, min_tokens=2,
        stop_token_ids=[3, 4], ignore_eos=True, n=3, logprobs=5, prompt_logprobs=0, seed=-7,
        logit_bias={11: 1.5},
    )  # fmt: skip
    assert sampling_of(temperature=0.0).temperature == 0.0
    assert sampling_of(top_k=2**32 - 1, max_tokens=2**32 - 1).max_tokens == 2**31 - 1


def test_stop_strings_ask_for_text() -> None:
    ours = inference_request(request(stop=["a", "", "b"], skip_special_tokens=True), "m", 100)
    assert list(ours.options.stop) == ["a", "b"]
    assert ours.options.include_text and ours.options.skip_special_tokens
    assert not inference_request(request(stop=[""]), "m", 100).options.include_text


@pytest.mark.parametrize(
    ("constraint", "form"),
    [
        ({"json_schema": "{}"}, pb.StructuredOutput(json_schema="{}")),
        ({"regex": "a+"}, pb.StructuredOutput(regex="a+")),
        ({"grammar": 'start: "a"'}, pb.StructuredOutput(lark='start: "a"')),
        ({"json_object": True}, pb.StructuredOutput(json_object=True)),
        ({"json_object": False}, pb.StructuredOutput()),
        (
            {"choice": vllm.ChoiceConstraint(choices=["x", "y"])},
            pb.StructuredOutput(choice=pb.Choice(texts=["x", "y"])),
        ),
    ],
)
def test_forms(constraint: dict[str, object], form: pb.StructuredOutput) -> None:
    assert sampling_of(**constraint).structured == form


def test_grammars_in_gbnf_become_lark() -> None:
    lark = sampling_of(grammar='root ::= "yes" | "no"').structured.lark
    assert "start:" in lark and '"yes"' in lark and "::=" not in lark
    with pytest.raises(InvalidRequest, match="neither Lark nor GBNF"):
        sampling_of(grammar='root ::= "yes" | (')
    with pytest.raises(InvalidRequest, match="structural_tag"):
        sampling_of(structural_tag="{}")


def test_prompts_can_be_cut_and_come_as_text() -> None:
    cut = inference_request(request(truncate_prompt_tokens=2), "m", 100)
    assert list(cut.token_ids.ids) == [6, 7]
    assert list(inference_request(request(truncate_prompt_tokens=-1), "m", 3).token_ids.ids) == [
        6,
        7,
    ]
    with pytest.raises(InvalidRequest, match="truncate_prompt_tokens"):
        inference_request(request(truncate_prompt_tokens=0), "m", 100)
    text = inference_request(vllm.GenerateRequest(text="hello"), "m", 100)
    assert text.text == "hello"


@pytest.mark.parametrize(
    "fields",
    [
        {"mm_inputs": vllm.MultimodalInputs(im_token_id=1)},
        {"media_refs": vllm.MediaRefs(items=[vllm.MediaRef(url="data:,")])},
        {"kv_transfer_params": vllm.KvTransferParams(remote_host="h")},
        {"kv_transfer_params_json": "{}"},
    ],
)
def test_what_would_be_another_answer_is_refused_by_name(fields: dict[str, object]) -> None:
    asked = request()
    asked.MergeFrom(vllm.GenerateRequest(**fields))
    with pytest.raises(InvalidRequest, match=f"`{next(iter(fields))}`"):
        inference_request(asked, "m", 100)


def test_negative_tokens_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"logit_bias\[-3\]"):
        sampling_of(logit_bias={-3: 1.0})
