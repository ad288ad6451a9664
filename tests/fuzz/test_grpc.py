"""Random bytes, damaged messages and random valid ones, on every gRPC method of a real gateway."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from support.target import VOCAB, Findings, Target

METHODS = {
    "Generate": pb.GenerateRequest,
    "Chat": pb.ChatRequest,
    "Tokenize": pb.TokenizeRequest,
    "Detokenize": pb.DetokenizeRequest,
    "ListModels": pb.ListModelsRequest,
    "GetModel": pb.GetModelRequest,
    "GenerateMany": pb.ManyRequest,
}
STREAMS = {"Generate", "Chat"}
STATED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
CODES = {code.value[0]: code.name for code in grpc.StatusCode}
WORDS = [
    "",
    "tiny",
    "none",
    "hello",
    "<|eot_id|>",
    "user",
    "assistant",
    "system",
    "🦙",
    "\x00",
    "{}",
]
WORDS += ['{"type": "object"}', "x" * 300, "the quick brown fox", "¿", "a\nb", "-1", "get_weather"]


def text(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(WORDS)
    return "".join(
        chr(rng.choice([rng.randint(32, 126), rng.randint(0xA0, 0xD7FF)])) for _ in range(9)
    )


def number(rng: random.Random, field: Field) -> float | int:
    if field.cpp_type in (Field.CPPTYPE_FLOAT, Field.CPPTYPE_DOUBLE):
        return rng.choice([0.0, 0.5, 1.0, rng.uniform(-3, 3), float("nan"), float("inf"), 1e30])
    if field.cpp_type == Field.CPPTYPE_ENUM:
        return rng.choice([value.number for value in field.enum_type.values])
    signed = field.cpp_type in (Field.CPPTYPE_INT32, Field.CPPTYPE_INT64)
    bits = 31 if field.cpp_type in (Field.CPPTYPE_INT32, Field.CPPTYPE_UINT32) else 63
    likely = [0, 1, 2, 5, 8, rng.randint(0, VOCAB - 1)]
    odd = [VOCAB, 2**bits - 1] + ([-1, -(2**bits)] if signed else [])
    return rng.choice(likely if rng.random() < 0.9 else odd)


def fill(rng: random.Random, message: Message, depth: int = 0) -> Message:
    """Set some of its fields to something of their kind."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < (0.35 if depth else 0.6):
            _set(rng, message, field, depth)
    return message


def _set(rng: random.Random, message: Message, field: Field, depth: int) -> None:
    target: Any = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for _ in range(rng.randint(0, 3)):
            if field.message_type.fields_by_name["key"].type == Field.TYPE_STRING:
                target[rng.choice(["traceparent", text(rng)])] = text(rng)
            else:
                target[rng.randint(0, VOCAB)] = rng.uniform(-200, 200)
    elif field.is_repeated:
        for _ in range(rng.choice([0, 1, 2, 3, 20])):
            if field.message_type is not None:
                fill(rng, target.add(), depth + 1)
            else:
                target.append(_scalar(rng, field))
    elif field.message_type is not None:
        if depth < 5:
            target.SetInParent()
            fill(rng, target, depth + 1)
    else:
        setattr(message, field.name, _scalar(rng, field))


def _scalar(rng: random.Random, field: Field) -> Any:  # noqa: ANN401
    if field.cpp_type == Field.CPPTYPE_STRING:
        return text(rng) if field.type == Field.TYPE_STRING else text(rng).encode()
    if field.cpp_type == Field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    return number(rng, field)


def payload(rng: random.Random, method: str) -> bytes:
    kind = rng.random()
    if kind < 0.15:
        return rng.randbytes(rng.randint(0, 200))
    message = fill(rng, METHODS[method]())
    if kind < 0.8 and hasattr(message, "model"):
        message.model = rng.choice(["", "tiny"])
    if kind < 0.7 and method in STREAMS:  # one that is likely to run
        message.ClearField("sampling")
        message.request_id = ""
        message.sampling.max_tokens = rng.randint(1, 12)
        message.sampling.n = rng.choice([1, 1, 1, 3])
        message.sampling.temperature = rng.choice([0, 0.7, 2])
        if method == "Generate":
            message.token_ids.ids[:] = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))]
        else:
            message.messages.add(role="user", content=text(rng))
    raw = bytearray(message.SerializeToString())
    if kind > 0.85 and raw:
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def many(rng: random.Random) -> list[bytes]:
    """Requests of a shared stream; most are likely to run, ids may repeat."""
    requests = []
    for number in range(1, rng.randint(2, 6)):
        kind = rng.random()
        if kind < 0.2:
            requests.append(payload(rng, "GenerateMany"))
            continue
        request = pb.ManyRequest(id=number if kind < 0.9 else rng.choice([0, 1, 2, 2**64 - 1]))
        part, method = rng.choice([("generate", "Generate"), ("chat", "Chat")])
        raw = payload(rng, method)
        tag = pb.ManyRequest.DESCRIPTOR.fields_by_name[part].number << 3 | 2
        requests.append(request.SerializeToString() + bytes((tag,)) + _varint(len(raw)) + raw)
    return requests


def _varint(value: int) -> bytes:
    head = b""
    while value > 0x7F:
        head += bytes((value & 0x7F | 0x80,))
        value >>= 7
    return head + bytes((value,))


def call_many(
    rng: random.Random, channel: grpc.Channel, findings: Findings, timeout_s: float, *, stays: bool
) -> None:
    """Run a shared stream, and note the status of each call."""
    requests = many(rng)
    sent = [raw.hex() for raw in requests]
    path = "/arriero.v1.Inference/GenerateMany"
    stream = channel.stream_stream(path)(iter(requests), timeout=timeout_s)
    for raw in stream:
        for answer in pb.ManyReply.FromString(raw).answers:
            if answer.HasField("status"):
                see(findings, CODES[answer.status.code], sent, answer.status.message)
        if not stays:
            stream.cancel()
            findings.see("left", "", "", stated=True)
            return


def see(findings: Findings, code: str, sent: object, details: str) -> None:
    stated = code in STATED or (code == "UNAVAILABLE" and "`resumed`" in details)
    findings.see(code, sent, details, stated=stated)


def call(rng: random.Random, channel: grpc.Channel, findings: Findings) -> None:
    method = rng.choice([*METHODS, "Generate", "Chat", "Chat"])
    path = f"/arriero.v1.Inference/{method}"
    raw = payload(rng, method)
    timeout_s = rng.choice([60, 60, 60, 0.01])
    stays = rng.random() < 0.8
    try:
        if method == "GenerateMany":
            call_many(rng, channel, findings, timeout_s, stays=stays)
        elif method in STREAMS:
            stream = channel.unary_stream(path)(raw, timeout=timeout_s)
            for _ in stream:
                if not stays:
                    stream.cancel()
                    findings.see("left", "", "", stated=True)
                    return
        else:
            channel.unary_unary(path)(raw, timeout=timeout_s)
        code, details = "OK", ""
    except grpc.RpcError as error:
        code, details = error.code().name, error.details() or ""
    see(findings, code, (method, raw.hex()), details)


@pytest.mark.timeout(0)
def test_every_method(target: Target, duration_s: float, caplog: pytest.LogCaptureFixture) -> None:
    until = time.monotonic() + duration_s
    findings = Findings("gRPC fuzz")

    def work(worker: int) -> None:
        rng = random.Random(worker)
        with grpc.insecure_channel(target.grpc) as channel:
            while time.monotonic() < until:
                call(rng, channel, findings)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    findings.close(target, caplog.records)
    assert findings.statuses["OK"] and findings.statuses["INVALID_ARGUMENT"]
