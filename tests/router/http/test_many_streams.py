"""Ten thousand made outputs through three APIs: streamed = whole under every cut of the stream."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer

from arriero.router.calls.conversation import ToolOffer
from arriero.router.http.answers import Encoder
from arriero.router.http.messages_api.events import MessageEvents
from arriero.router.http.responses import ChatCompletion
from arriero.router.http.responses_api.events import ResponseEvents
from arriero.router.http.responses_api.schemas import ResponsesBody
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import OutputOptions
from arriero.router.response import Answer, TextDelta
from arriero.router.text.text_model import TextModel
from arriero.shards.engine.types import SequenceOutput
from support.frontdoor import make_card
from support.made_outputs import TOOLS, Made, make

NUM_OUTPUTS = 10_000
PARTS = 10
END = 1

Json = dict[str, Any]
Parts = list[tuple[str, str]]
"""Texts and calls in order: ("", text) or (name, arguments)."""


@pytest.fixture(scope="module")
def text(llama_tokenizer: Tokenizer) -> TextModel:
    return TextModel(make_card(llama_tokenizer, None))


def messages(
    text: TextModel, tokens: Sequence[int], edges: Sequence[int], *, cut_off: bool
) -> list[pb.GenerateResponse | TextDelta]:
    """The messages of an answer whose tokens arrive in groups that end at `edges`."""
    tools = tuple({"type": "function", "function": {"name": name}} for name in TOOLS)
    answer = Answer(pb.Start(), 3, 1, OutputOptions(), text, ToolOffer(tools=tools))
    made, start = [], 0
    for end in [*edges, len(tokens)]:
        last = end == len(tokens)
        output = SequenceOutput(request_id="", index=0, tokens=tuple(tokens[start:end]))
        if last:
            output.finish_reason = "length" if cut_off else "stop"
            output.stop_token = None if cut_off else END
        start = end
        message = answer.add([output])
        if message is not None:
            made.append(message)
        if last:
            break
    return made


def encoders(text: TextModel) -> list[Encoder]:
    return [
        ChatCompletion("tiny", text.tokenizer, with_usage=True),
        MessageEvents("tiny"),
        ResponseEvents("tiny", ResponsesBody(input="x")),
    ]


def events(data: bytes) -> Iterator[Json]:
    for line in data.decode().splitlines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def read_chat(data: bytes) -> Json:
    content, calls, reason, usage = "", [], None, None
    for event in events(data):
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            content += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", ()):
                assert call["index"] == len(calls) and call["id"]
                calls.append((call["function"]["name"], call["function"]["arguments"]))
            assert reason is None
            reason = choice["finish_reason"]
    return {"parts": [*([("", content)] if content else []), *calls], "end": reason, "usage": usage}


def whole_chat(answer: Json) -> Json:
    (choice,) = answer["choices"]
    content = choice["message"]["content"]
    calls = [
        (call["function"]["name"], call["function"]["arguments"])
        for call in choice["message"].get("tool_calls", ())
    ]
    parts = [*([("", content)] if content else []), *calls]
    return {"parts": parts, "end": choice["finish_reason"], "usage": answer["usage"]}


def read_messages(data: bytes) -> Json:
    parts: Parts = []
    last: Json = {}
    is_open = False
    for event in events(data):
        kind = event["type"]
        if kind == "content_block_start":
            assert not is_open and event["index"] == len(parts)
            is_open = True
            parts.append((event["content_block"].get("name", ""), ""))
        elif kind == "content_block_delta":
            assert is_open and event["index"] == len(parts) - 1
            delta = event["delta"]
            name, so_far = parts[-1]
            parts[-1] = (name, so_far + delta.get("text", "") + delta.get("partial_json", ""))
        elif kind == "content_block_stop":
            assert is_open and event["index"] == len(parts) - 1
            is_open = False
        elif kind == "message_delta":
            assert not is_open and not last
            last = event
    parts = [(name, dumped(said) if name else said) for name, said in parts]
    return {"parts": parts, "end": last["delta"], "usage": last["usage"]}


def whole_messages(answer: Json) -> Json:
    parts = [
        ("", block["text"]) if block["type"] == "text" else (block["name"], dumped(block["input"]))
        for block in answer["content"]
    ]
    end = {name: answer[name] for name in ("stop_reason", "stop_sequence")}
    return {"parts": parts, "end": end, "usage": answer["usage"]}


def read_responses(data: bytes) -> Json:
    """The response as its deltas give it; equal to what the last event says."""
    parts: Parts = []
    last: Json = {}
    for number, event in enumerate(events(data)):
        assert event["sequence_number"] == number and not last
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(parts)
            parts.append((event["item"].get("name", ""), ""))
        elif kind in ("output_text.delta", "function_call_arguments.delta"):
            name, so_far = parts[event["output_index"]]
            assert event["output_index"] == len(parts) - 1
            parts[-1] = (name, so_far + event["delta"])
        elif kind in ("output_text.done", "function_call_arguments.done"):
            assert parts[-1][1] == event.get("text", event.get("arguments"))
        elif kind in ("completed", "incomplete"):
            last = event["response"]
    assert parts == whole_responses(last)["parts"]
    return whole_responses(last)


def whole_responses(answer: Json) -> Json:
    parts = [
        ("", item["content"][0]["text"])
        if item["type"] == "message"
        else (item["name"], item["arguments"])
        for item in answer["output"]
    ]
    items = {(item["type"], item["status"]) for item in answer["output"]}
    end = (answer["status"], answer["incomplete_details"], sorted(items))
    return {"parts": parts, "end": end, "usage": answer["usage"]}


def dumped(arguments: str | Json) -> str:
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    return json.dumps(value, ensure_ascii=False)


READERS = (read_chat, read_messages, read_responses)
WHOLES = (whole_chat, whole_messages, whole_responses)


def streamed(encoder: Encoder, sent: Sequence[pb.GenerateResponse | TextDelta]) -> bytes:
    usages = [m.usage for m in sent if isinstance(m, pb.GenerateResponse) and m.HasField("usage")]
    return b"".join(encoder.encoded(0, message) for message in sent) + encoder.end(usages)


def whole(encoder: Encoder, sent: Sequence[pb.GenerateResponse | TextDelta]) -> Json:
    return encoder.whole(
        [(0, m.to_wire() if isinstance(m, TextDelta) else m) for m in sent]  # as `gather` does
    )


def check(text: TextModel, seed: int) -> None:
    draw = random.Random(seed)
    made = make(draw)
    tokens = text.tokenizer.encode(made.text, add_special_tokens=False)
    cut_off = draw.random() < 0.25
    if cut_off:
        tokens = tokens[: draw.randint(1, len(tokens))]
    else:
        tokens = [*tokens, END]
    size = len(tokens)
    cuttings = [sorted(draw.sample(range(1, size), min(size - 1, draw.randint(1, 12))))]
    if seed // PARTS % 8 == 0:
        cuttings.append(list(range(1, size)))
    at_once = messages(text, tokens, [], cut_off=cut_off)
    expected = [
        read(whole(encoder, at_once)) for read, encoder in zip(WHOLES, encoders(text), strict=True)
    ]
    if not cut_off:
        compare_with_made(made, expected, seed)
    for edges in cuttings:
        sent = messages(text, tokens, edges, cut_off=cut_off)
        where = f"seed {seed}, cut at {edges}: {made.text!r}"
        trios = zip(encoders(text), READERS, expected, strict=True)
        for encoder, read_stream, right in trios:
            assert read_stream(streamed(encoder, sent)) == right, where
        for encoder, read_whole, right in zip(encoders(text), WHOLES, expected, strict=True):
            assert read_whole(whole(encoder, sent)) == right, where


def compare_with_made(made: Made, expected: Sequence[Json], seed: int) -> None:
    """What a model ended by itself holds the calls and the content that were made."""
    for answer in expected:
        content = "".join(said for name, said in answer["parts"] if not name)
        calls = [(name, json.loads(said)) for name, said in answer["parts"] if name]
        assert (content, calls) == (made.content, made.calls), f"seed {seed}: {made.text!r}"


@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=pytest.mark.slow if part > 1 else ()) for part in range(PARTS)],
)
def test_streamed_is_whole_in_every_api(text: TextModel, part: int) -> None:
    for seed in range(part, NUM_OUTPUTS, PARTS):
        check(text, seed)
