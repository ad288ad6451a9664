"""The client whose calls share a stream: answers, errors and breaks as with a stream for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from tokenizers import Tokenizer

from arriero.router.client import multiplexer
from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.model_card import ModelCard
from arriero.shards.engine.sequence import sample_seed
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import InvalidRequest, NotFound, Overloaded, Unauthenticated, Unavailable
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, Stack, endless, make_card, serve
from support.guarded_gateway import BAD, guarded, policy
from support.shared_stream import Answer


@pytest.fixture
def card(llama_tokenizer: Tokenizer) -> ModelCard:
    return make_card(llama_tokenizer, LLAMA3, max_model_len=100_000)


@pytest.fixture
async def running(card: ModelCard) -> AsyncIterator[Stack]:
    async with serve(card, endless, step_s=0.002) as stack:
        yield stack


async def collect(messages: AsyncIterator[pb.GenerateResponse]) -> Answer:
    answer = Answer()
    async for message in messages:
        answer.add(message)
    return answer


def num_streams(stack: Stack) -> int:
    return len(stack.gateway._service._many._streams)


async def test_both_kinds_of_client_get_the_same(running: Stack) -> None:
    async def ask(client: AsyncClient, number: int) -> Answer | str:
        fields = {"request_id": f"r{number}", "seed": 1, "max_tokens": 40}
        try:
            match number % 6:
                case 0:
                    return await collect(client.generate([60], **(fields | {"model": "none"})))
                case 1:
                    return await collect(client.generate([60] * 3, **(fields | {"n": 0})))
                case 2:
                    question = [{"role": "user", "content": f"question {number}"}]
                    return await collect(client.chat(question, **fields))
                case 3:
                    answer = Answer()
                    async for message in client.generate([60] * number, max_tokens=50_000):
                        answer.add(message)
                        if answer.num_tokens >= 5:
                            break
                    return "left"
                case _:
                    return await collect(client.generate([60] * number, **fields, n=2, logprobs=0))
        except (InvalidRequest, NotFound) as error:
            return f"{type(error).__name__}: {error}"

    async with AsyncClient(running.address, multiplexed=True, timeout_s=60) as client:
        shared = await asyncio.gather(*(ask(client, number) for number in range(1, 65)))
        assert num_streams(running) == 1
        assert await client.models() == await running.client.models()
    separate = await asyncio.gather(*(ask(running.client, number) for number in range(1, 65)))
    assert shared == separate
    await eventually_async(lambda: not running.engine.running)
    await eventually_async(lambda: not num_streams(running))


async def test_errors_are_the_gateways(running: Stack) -> None:
    async with AsyncClient(running.address, multiplexed=True, timeout_s=0.3) as client:
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await collect(client.generate([60]))
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually_async(lambda: not running.engine.running)
    running.engine.max_queued = 0
    async with AsyncClient(running.address, multiplexed=True) as client:
        with pytest.raises(Overloaded) as caught:
            await collect(client.generate([60]))
    assert caught.value.retry_after_s == 4
    async with AsyncClient("127.0.0.1:1", multiplexed=True) as client:
        with pytest.raises(Unavailable):
            await collect(client.generate([60]))


async def test_a_wrong_key_is_named(card: ModelCard, tmp_path) -> None:  # noqa: ANN001
    (tmp_path / "keys.yaml").write_text("keys: []\n")
    async with (
        serve(card, endless, config=GatewayConfig(keys=tmp_path / "keys.yaml")) as stack,
        AsyncClient(stack.address, multiplexed=True, api_key="x") as client,
    ):
        with pytest.raises(Unauthenticated):
            await collect(client.generate([60], max_tokens=1))


async def test_refused_calls_are_tried_again(running: Stack) -> None:
    running.engine.max_queued = 0
    async with AsyncClient(running.address, multiplexed=True, retries=5, timeout_s=30) as client:
        asking = asyncio.create_task(collect(client.generate([60], max_tokens=3)))
        await asyncio.sleep(0.3)
        running.engine.max_queued = 100
        assert (await asking).num_tokens == 3


async def test_more_calls_than_a_stream_carries(
    running: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiplexer, "MAX_STREAM_CALLS", 10)
    async with AsyncClient(running.address, multiplexed=True, timeout_s=60) as client:
        running.engine.max_running = 0
        asking = [
            asyncio.create_task(collect(client.generate([60], max_tokens=4))) for _ in range(25)
        ]
        await eventually_async(lambda: len(running.engine.submitted) == 25)
        assert num_streams(running) == 3
        running.engine.max_running = None
        assert [answer.num_tokens for answer in await asyncio.gather(*asking)] == [4] * 25


def by_seed_and_position(request: EngineRequest, index: int, position: int) -> int:
    """As the contract asks: a function of seed, prompt and position alone."""
    seed = sample_seed(request.params.seed or 0, index)
    return 60 + (seed * 31 + len(request.prompt) * 7 + position * 11) % 300


async def test_streams_go_on_at_another_gateway(card: ModelCard) -> None:
    """The first gateway goes in mid-stream; each call's tokens and text are as without the loss."""
    async with serve(card, by_seed_and_position, step_s=0.005) as stack:
        other = Gateway(GatewayConfig())
        port = await other.start()
        await other.set_groups([GroupAddress(card.group, card.model, stack.link_address)])
        await eventually_async(lambda: other.ready)
        addresses = [stack.address, f"127.0.0.1:{port}"]

        async def ask_all(*, stop: bool) -> list[Answer]:
            async with AsyncClient(
                addresses, multiplexed=True, timeout_s=60, resume_s=20
            ) as client:
                asking = [
                    asyncio.create_task(
                        collect(client.generate([60] * number, max_tokens=80, seed=number, n=2))
                    )
                    for number in range(1, 9)
                ]
                if stop:
                    before = len(stack.engine.submitted)
                    await eventually_async(
                        lambda: len(stack.engine.submitted) - before >= 8 and stack.engine.steps
                    )
                    await asyncio.sleep(0.1)
                    await stack.gateway.stop(0)
                return await asyncio.gather(*asking)

        try:
            undisturbed = await ask_all(stop=False)
            resumed = await ask_all(stop=True)
            assert len(stack.engine.submitted) > 16
        finally:
            await other.stop(0)
    assert [a.tokens for a in resumed] == [a.tokens for a in undisturbed]
    assert [a.text for a in resumed] == [a.text for a in undisturbed]
    assert all(answer.num_tokens == 160 for answer in resumed)


async def test_closing_ends_the_calls(running: Stack) -> None:
    client = AsyncClient(running.address, multiplexed=True, resume_s=20)
    stream = client.generate([60])
    await anext(stream)
    await client.close()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stream)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    await eventually_async(lambda: not running.engine.running)


async def test_unsafe_output_is_cut(llama_tokenizer: Tokenizer) -> None:
    async with (
        guarded(llama_tokenizer, BAD, policy(output="cut")) as stack,
        AsyncClient(stack.client._address, multiplexed=True, timeout_s=60) as client,
    ):
        question = [{"role": "user", "content": "A story."}]
        answers = await asyncio.gather(
            *(collect(client.chat(question, model="tiny", n=2)) for _ in range(2))
        )
        for answer in answers:
            for index in range(2):
                assert BAD.startswith(answer.text[index].strip())
                assert "bom" not in answer.text[index]
                assert answer.ends[index] == pb.FINISH_REASON_CONTENT_FILTER
        await eventually_async(lambda: not stack.model.running, 10)
