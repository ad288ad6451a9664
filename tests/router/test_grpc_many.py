"""Many calls on one stream, beside the same calls on streams of their own, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer

from arriero.router import grpc_many
from arriero.router.client.client import AsyncClient
from arriero.router.gateway import GatewayConfig
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.proto.arriero.v1.inference_pb2_grpc import InferenceStub
from arriero.router.tenants.keys import add_key
from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.router.text.model_card import ModelCard
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, Stack, echo, endless, make_card, serve
from support.shared_stream import (
    Answer,
    SharedStream,
    cancel,
    chat,
    generate,
    shared_stream,
    stalling,
)

Code = grpc.StatusCode


@pytest.fixture
def card(llama_tokenizer: Tokenizer) -> ModelCard:
    return make_card(llama_tokenizer, LLAMA3, max_model_len=100_000)


@pytest.fixture
async def running(card: ModelCard) -> AsyncIterator[Stack]:
    async with serve(card, endless, step_s=0.002) as stack:
        yield stack


@pytest.fixture
async def stream(running: Stack) -> AsyncIterator[SharedStream]:
    async with shared_stream(running.address) as stream:
        yield stream


def code(status: pb.CallStatus) -> grpc.StatusCode:
    return next(code for code in Code if code.value[0] == status.code)


async def alone(channel: grpc.aio.Channel, request: pb.ManyRequest) -> tuple[Answer, pb.CallStatus]:
    """The answer to a request on a stream of its own."""
    answer, status = Answer(), pb.CallStatus()
    stub = InferenceStub(channel)
    method = stub.Generate if request.WhichOneof("kind") == "generate" else stub.Chat
    call = method(getattr(request, request.WhichOneof("kind") or ""))
    try:
        async for message in call:
            answer.add(message)
    except grpc.aio.AioRpcError as error:
        status.code, status.message = error.code().value[0], error.details() or ""
    for name, value in await call.trailing_metadata() or ():
        status.metadata[name] = str(value)
    for name, value in await call.initial_metadata() or ():
        status.metadata[name] = str(value)
    return answer, status


def requests_of_a_crowd() -> list[pb.ManyRequest]:
    """64 requests: most run to their end, some are refused, some are left, some run late."""
    crowd = []
    for number in range(1, 65):
        fields: dict[str, Any] = {"request_id": f"r{number}", "seed": number, "max_tokens": 40}
        prompt = [60] * (3 + number)
        match number % 8:
            case 0:
                request = generate(number, prompt, **(fields | {"max_tokens": 0}))
            case 1 | 2:  # cancelled, or late
                request = generate(number, prompt, **(fields | {"max_tokens": 50_000}))
            case 3:
                request = chat(number, f"question {number}", **fields)
            case 4:
                request = generate(number, prompt, **fields, n=3, logprobs=1)
            case _:
                request = generate(number, prompt, **fields)
        if number % 8 == 2:
            request.timeout_s = 0.5
        crowd.append(request)
    return crowd


async def test_a_crowd_on_one_stream_is_answered_as_on_64(
    running: Stack, stream: SharedStream
) -> None:
    crowd = requests_of_a_crowd()
    await stream.send(*crowd)

    async def leave(call_id: int) -> None:
        await eventually_async(lambda: stream.answers[call_id].num_tokens >= 10, 30)
        await stream.send(cancel(call_id))

    for request in crowd[0::8]:
        await leave(request.id)
    whole = [request for request in crowd if request.id % 8 not in (1, 2)]
    async with grpc.aio.insecure_channel(running.address) as channel:
        answers = await asyncio.gather(*(alone(channel, request) for request in whole))
    separate = dict(zip((request.id for request in whole), answers, strict=True))
    for request in crowd:
        status = await stream.status(request.id)
        kind = request.id % 8
        if kind in (1, 2):
            assert code(status) is (Code.CANCELLED if kind == 1 else Code.DEADLINE_EXCEEDED)
            prompt = len(request.generate.token_ids.ids)
            tokens = stream.answers[request.id].tokens[0]
            assert tokens == [50 + (i * 7 + prompt) % 200 for i in range(len(tokens))]
            continue
        expected, expected_status = separate[request.id]
        assert stream.answers[request.id] == expected
        assert status.code == expected_status.code and status.message == expected_status.message
        assert dict(status.metadata) == dict(expected_status.metadata)
        assert code(status) is (Code.OK if kind else Code.INVALID_ARGUMENT)
    await eventually_async(lambda: not running.engine.running)
    assert len(running.engine.cancelled) == 16
    await stream.call.done_writing()
    await stream.reader
    assert await stream.call.code() is Code.OK


async def test_a_step_is_a_message(card: ModelCard) -> None:
    async with (
        serve(card, endless, step_s=0.05) as stack,
        shared_stream(stack.address) as stream,
    ):
        stack.engine.max_running = 0
        await stream.send(*(generate(i, [60], max_tokens=10) for i in range(1, 33)))
        await eventually_async(lambda: len(stack.engine.submitted) == 32)
        stack.engine.max_running = None
        for call_id in range(1, 33):
            assert code(await stream.status(call_id)) is Code.OK
        assert len(stream.replies) <= 20  # ten, unless the machine is slow
        assert max(len(reply.answers) for reply in stream.replies) == 32


async def test_refusals_end_their_own_call(running: Stack, stream: SharedStream) -> None:
    """Ids, kinds, deadlines and bytes that are not valid, while another call goes on."""
    await stream.send(generate(7, [60], max_tokens=400))
    highest = 2**64 - 1
    broken = b"\x08\x0b\x12\x04\x12\x02\xff\xfe"  # id 11, then a string that is not UTF-8
    refused: list[tuple[int, pb.ManyRequest | bytes, str]] = [
        (0, generate(0, [60], max_tokens=1), "`id`=0 must be at least 1"),
        (3, pb.ManyRequest(id=3), "set one of `generate`, `chat` and `cancel`"),
        (11, broken, "not UTF-8"),
    ]
    for number, timeout_s in enumerate((0.0, -1.0, float("nan"), float("inf"), 1e9)):
        request = generate(20 + number, [60], max_tokens=1)
        request.timeout_s = timeout_s
        refused.append((20 + number, request, "`timeout_s`="))
    for call_id, request, words in refused:
        await stream.send(request)
        status = await stream.status(call_id)
        assert code(status) is Code.INVALID_ARGUMENT and words in status.message, status
        assert not stream.answers[call_id].num_tokens
    await stream.send(b"\xff\xff\xff")  # not even an id
    await eventually_async(lambda: len(stream.statuses[0]) == 2)
    await stream.send(cancel(99), generate(highest, [60], max_tokens=3))
    assert code(await stream.status(highest)) is Code.OK
    assert stream.answers[highest].num_tokens == 3
    assert code(await stream.status(7)) is Code.OK
    assert stream.answers[7].num_tokens == 400
    assert not stream.statuses[99]
    await stream.send(generate(7, [60], max_tokens=2))  # an id is free after the status
    await eventually_async(lambda: len(stream.statuses[7]) == 2)


async def test_an_id_given_twice_ends_both_calls(running: Stack, stream: SharedStream) -> None:
    await stream.send(generate(1, [60]), generate(2, [60], max_tokens=200))
    await eventually_async(lambda: stream.answers[1].num_tokens > 5)
    await stream.send(chat(1, "again"))
    status = await stream.status(1)
    assert code(status) is Code.INVALID_ARGUMENT and "not ended" in status.message
    assert status.metadata["arriero-field"] == "id"
    assert code(await stream.status(2)) is Code.OK
    assert len(running.engine.cancelled) == 1 and not running.engine.running


async def test_limits_name_the_remedy(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_many, "MAX_STREAM_CALLS", 4)
    config = GatewayConfig(max_calls=6)
    async with (
        serve(card, endless, step_s=0.002, config=config) as stack,
        shared_stream(stack.address) as first,
        shared_stream(stack.address) as second,
    ):
        await first.send(*(generate(i, [60]) for i in range(1, 6)))
        status = await first.status(5)
        assert code(status) is Code.RESOURCE_EXHAUSTED and status.metadata["retry-after"] == "1"
        assert (
            "the 4 that a stream carries" in status.message and "another stream" in status.message
        )
        await second.send(*(generate(i, [60]) for i in range(1, 4)))
        status = await second.status(3)
        assert code(status) is Code.RESOURCE_EXHAUSTED and "runs 6 calls" in status.message
        await first.send(cancel(1))
        await first.status(1)
        await second.send(generate(4, [60], max_tokens=2))
        assert code(await second.status(4)) is Code.OK


async def test_keys_and_quotas_are_those_of_each_call(card: ModelCard, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    key, other = add_key(path, "acme"), add_key(path, "few")
    tenants = (Tenant(name="few", requests_per_minute=2),)
    config = GatewayConfig(keys=path, tenants=tenants, limits=QueueLimits(max_wait_s=0.5))
    async with serve(card, endless, step_s=0.002, config=config) as stack:
        async with shared_stream(stack.address) as stream:
            await stream.reader
            assert stream.error is not None and stream.error.code() is Code.UNAUTHENTICATED
        async with shared_stream(stack.address, ("authorization", f"Bearer {key}")) as stream:
            for call_id in range(1, 7):
                request = generate(call_id, [60], max_tokens=2)
                if call_id % 2:
                    request.metadata["authorization"] = f"Bearer {other}"
                    request.metadata["x-prompt-cache-key"] = f"s{call_id}"
                await stream.send(request)
            codes = [code(await stream.status(call_id)) for call_id in range(1, 7)]
            assert [c for c in codes[1::2]] == [Code.OK] * 3
            assert sorted(c.name for c in codes[0::2]) == ["OK", "OK", "RESOURCE_EXHAUSTED"]
            submitted = {r.tenant: r for r in stack.engine.submitted}
            assert submitted.keys() == {"acme", "few"}
            assert submitted["few"].hint is not None
            request = generate(9, [60])
            request.metadata["authorization"] = "Bearer none"
            await stream.send(request)
            assert code(await stream.status(9)) is Code.UNAUTHENTICATED


async def test_a_client_that_goes_cancels_all(running: Stack) -> None:
    for number in range(2):
        async with shared_stream(running.address) as stream:
            await stream.send(*(generate(i, [60]) for i in range(1, 17)))
            await eventually_async(lambda s=stream: s.answers[16].num_tokens > 2)  # type: ignore[misc]
        await eventually_async(lambda: not running.engine.running)
        assert len(running.engine.cancelled) == 16 * (number + 1)
    many = running.gateway._service._many
    await eventually_async(lambda: not many._streams)
    assert many.num_calls == 0


async def test_a_slow_reader_holds_an_answer_a_call(card: ModelCard) -> None:
    """Nothing is read while all tokens are computed; then every token comes, in few messages."""
    flows = asyncio.Event()
    flows.set()
    async with (
        serve(card, endless) as stack,
        stalling(stack.address, flows) as address,
        shared_stream(address) as stream,
    ):
        fields = {"max_tokens": 250, "n": 4, "logprobs": 2, "ignore_eos": True}
        await stream.send(*(generate(i, [60], **fields) for i in range(1, 9)))
        await eventually_async(lambda: stream.answers[8].num_tokens > 8)
        flows.clear()
        await eventually_async(lambda: not stack.engine.running, 30)
        (server,) = stack.gateway._service._many._streams
        await eventually_async(lambda: len(server._running) == 8)
        await asyncio.sleep(0.1)
        assert len(server.outbox.reply.answers) <= 8
        flows.set()
        for call_id in range(1, 9):
            assert code(await stream.status(call_id)) is Code.OK
            tokens = stream.answers[call_id].tokens
            for index in range(4):
                assert tokens[index] == [50 + (i * 7 + index * 3 + 1) % 200 for i in range(250)]
        assert stream.answers[1].num_logprobs == 1000


async def test_refusals_wait_for_a_reader(card: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends bad requests and reads nothing fills no memory."""
    monkeypatch.setattr(grpc_many, "MAX_STREAM_CALLS", 20)
    flows = asyncio.Event()
    flows.set()
    bad = pb.ManyRequest(id=1, timeout_s=-1.0, generate=pb.GenerateRequest(text="x"))
    async with (
        serve(card, endless) as stack,
        stalling(stack.address, flows) as address,
        shared_stream(address) as stream,
    ):

        async def flood() -> None:
            for _ in range(800):
                await stream.send(bad)

        await stream.send(bad)
        await stream.status(1)
        (server,) = stack.gateway._service._many._streams
        flows.clear()
        sending = asyncio.create_task(flood())
        await eventually_async(lambda: len(server.outbox.reply.answers) == 20, 30)
        await asyncio.sleep(0.1)
        assert len(server.outbox.reply.answers) == 20
        flows.set()
        await sending
        await eventually_async(lambda: len(stream.statuses[1]) == 801, 30)


async def test_draining_finishes_what_runs(card: ModelCard) -> None:
    async with serve(card, endless, step_s=0.005) as stack:
        async with shared_stream(stack.address) as stream, shared_stream(stack.address) as idle:
            await stream.send(generate(1, [60], max_tokens=200))
            await idle.send(generate(1, [60], max_tokens=1))
            await idle.status(1)
            await eventually_async(lambda: stream.answers[1].num_tokens)
            stopping = asyncio.create_task(stack.gateway.stop(60))
            await idle.reader
            assert idle.error is not None and idle.error.code() is Code.UNAVAILABLE
            await stream.send(generate(2, [60], max_tokens=5))
            refused = await stream.status(2)
            assert code(refused) is Code.UNAVAILABLE and "stopping" in refused.message
            assert code(await stream.status(1)) is Code.OK
            assert stream.answers[1].num_tokens == 200
            async with asyncio.timeout(20):
                await stopping
            await stream.reader
            assert stream.error is not None and stream.error.code() is Code.UNAVAILABLE
        async with AsyncClient(stack.address, multiplexed=True, timeout_s=5) as client:
            with pytest.raises(Exception, match=r"(?i)connect"):
                _ = [message async for message in client.generate([60], max_tokens=1)]


async def test_internal_faults_show_no_traceback(
    card: ModelCard, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.router.inference.read_options", lambda _: 1 / 0)
    async with serve(card, echo) as stack, shared_stream(stack.address) as stream:
        await stream.send(generate(1, "x", request_id="find-me"))
        status = await stream.status(1)
    assert code(status) is Code.INTERNAL and "find-me" in status.message
    assert status.metadata["x-request-id"] == "find-me"
    assert "division" not in status.message
    assert "ZeroDivisionError" in caplog.text and "find-me" in caplog.text
