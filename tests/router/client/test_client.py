"""The Python client: retries within a deadline, and none of what has begun."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence

import grpc
import pytest
from tokenizers import Tokenizer

from arriero.router.client.client import AsyncClient, Client
from arriero.router.client.retry import Retry
from arriero.router.client.stream_attempts import StreamAttempts
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.engine.sequence import sample_seed
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from support.frontdoor import LLAMA3, echo, endless, make_card, serve


def test_waits_double_up_to_the_deadline() -> None:
    now = 0.0
    retry = Retry(10, 5.0, clock=lambda: now)
    waits = []
    while (wait_s := retry.wait_s(Unavailable("x"))) is not None:
        waits.append(wait_s)
        now += wait_s
    assert 4 <= len(waits) <= 6 and now < 5.0
    assert all(0.1 * 2**i <= wait_s <= 0.2 * 2**i for i, wait_s in enumerate(waits))


def test_what_is_not_tried_again() -> None:
    assert Retry(3, None).wait_s(InvalidRequest("n", "no")) is None
    assert Retry(0, None).wait_s(Unavailable("x")) is None
    assert Retry(3, 2.0).wait_s(Overloaded("full", 3.0)) is None
    waited = Retry(3, None).wait_s(Overloaded("full", 3.0))
    assert waited is not None and waited >= 3.0


async def test_both_clients_come_back(llama_tokenizer: Tokenizer) -> None:
    async with serve(make_card(llama_tokenizer, LLAMA3), echo) as stack:

        async def make_room() -> None:
            await asyncio.sleep(0.3)
            stack.engine.max_queued = 100

        def ask() -> str:
            with Client(stack.address, timeout_s=30, retries=5) as client:
                return "".join(o.text for r in client.generate("llama") for o in r.outputs)

        stack.engine.max_queued = 0
        making = asyncio.create_task(make_room())
        async with AsyncClient(stack.address, timeout_s=30, retries=5) as client:
            answers = [one async for one in client.generate("llama")]
            assert answers[-1].usage.completion_tokens
        await making
        stack.engine.max_queued = 0
        making = asyncio.create_task(make_room())
        assert "llama" in await asyncio.to_thread(ask)
        await making

        stack.engine.max_queued = 0
        begun = time.monotonic()
        async with AsyncClient(stack.address, timeout_s=1, retries=50) as client:
            with pytest.raises(Overloaded):
                [one async for one in client.generate("llama")]
        assert time.monotonic() - begun < 2


@pytest.mark.parametrize("kind", ["async", "shared stream", "blocking"])
async def test_a_call_that_no_gateway_answers_goes_to_the_next(
    llama_tokenizer: Tokenizer, kind: str
) -> None:
    """The gateway was killed before a call began: retries at its address would never end."""
    async with serve(make_card(llama_tokenizer, LLAMA3), echo) as stack:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        addresses = [f"127.0.0.1:{port}", stack.address]

        def ask() -> str:
            with Client(addresses, timeout_s=30, retries=1000) as client:
                return "".join(o.text for r in client.generate("llama") for o in r.outputs)

        if kind == "blocking":
            assert "llama" in await asyncio.to_thread(ask)
            return
        multiplexed = kind == "shared stream"
        async with AsyncClient(
            addresses, timeout_s=30, retries=1000, multiplexed=multiplexed
        ) as client:
            answers = [answer async for answer in client.generate("llama")]
        assert answers[-1].usage.completion_tokens


@pytest.mark.parametrize("kind", [AsyncClient, Client])
@pytest.mark.parametrize("address", [lambda: [], []], ids=["function", "list"])
async def test_a_client_that_knows_no_gateway_says_so(
    address: Sequence[str] | Callable[[], Sequence[str]], kind: type[AsyncClient | Client]
) -> None:
    with pytest.raises(Unavailable, match="`address` names no gateway"):
        kind(address)


class Broken(grpc.RpcError):
    """The status of a call whose connection broke."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self.code, self.details = lambda: code, lambda: "gone"
        self.trailing_metadata = self.initial_metadata = tuple[tuple[str, str], ...]


def attempts_of(
    request: pb.GenerateRequest, clock: Callable[[], float], retries: int = 0
) -> StreamAttempts:
    return StreamAttempts(
        request,
        address="a:1",
        discover=lambda: ["a:1", "b:1"],
        retry=Retry(retries, None),
        resume_s=5.0,
        clock=clock,
    )


def some_tokens(*token_ids: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        start=pb.Start(seed=7, weights="w"), outputs=[pb.Output(index=0, token_ids=token_ids)]
    )


def test_attempts_go_round_the_gateways_until_the_limit() -> None:
    now_s = 100.0
    request = pb.GenerateRequest(text="x")
    attempts = attempts_of(request, lambda: now_s)
    assert attempts.new_address() is None
    attempts.add(some_tokens(3, 4))
    visited = []
    for _ in range(3):
        assert attempts.wait_s(Broken()) == pytest.approx(0.1)
        visited.append(attempts.new_address())
        now_s += 2.0
    assert visited == ["b:1", "a:1", "b:1"]
    assert (request.sampling.seed, request.resumed.weights) == (7, "w")
    assert list(request.resumed.samples[0].token_ids) == [3, 4]
    with pytest.raises(Unavailable, match="gone"):  # 6 s after the break
        attempts.wait_s(Broken())


def test_a_message_starts_the_limit_anew() -> None:
    now_s = 100.0
    attempts = attempts_of(pb.GenerateRequest(text="x"), lambda: now_s)
    attempts.add(some_tokens(3))
    assert attempts.wait_s(Broken()) is not None
    now_s += 4.0
    attempts.add(some_tokens(4))
    now_s += 4.0
    assert attempts.wait_s(Broken()) is not None


def test_attempts_end_with_the_last_message_or_a_refusal() -> None:
    attempts = attempts_of(pb.GenerateRequest(text="x"), lambda: 0.0)
    with pytest.raises(NotFound):
        attempts.wait_s(Broken(grpc.StatusCode.NOT_FOUND))
    attempts.add(pb.GenerateResponse(usage=pb.Usage(completion_tokens=1)))
    assert attempts.wait_s(Broken()) is None


def by_seed_and_position(request: EngineRequest, index: int, position: int) -> int:
    """As the contract asks: a function of seed, prompt and position alone."""
    seed = sample_seed(request.params.seed or 0, index)
    return 60 + (seed * 31 + len(request.prompt) * 7 + position * 11) % 300


@pytest.mark.parametrize("discovered", [False, True])
async def test_the_blocking_client_resumes_its_stream_at_another_gateway(
    llama_tokenizer: Tokenizer, discovered: bool
) -> None:
    """The first gateway goes in mid-stream; tokens, text and end are as without the loss.

    The other gateway is known from the start, or only after the first is gone.
    """
    fields = {"max_tokens": 120, "temperature": 0.7, "seed": 5, "ignore_eos": True, "n": 2}
    card = make_card(llama_tokenizer, LLAMA3)
    async with serve(card, by_seed_and_position, step_s=0.005) as stack:
        other = Gateway(GatewayConfig())
        port = await other.start()
        await other.set_groups([GroupAddress(card.group, card.model, stack.link_address)])
        addresses = [stack.address, *([] if discovered else [f"127.0.0.1:{port}"])]
        loop = asyncio.get_running_loop()

        def stop_gateway() -> None:
            addresses[:] = [f"127.0.0.1:{port}"] if discovered else addresses
            asyncio.run_coroutine_threadsafe(stack.gateway.stop(0), loop).result(10)

        def ask(stop_after: int | None) -> tuple[list[list[int]], list[str], int]:
            tokens: list[list[int]] = [[], []]
            text, last = ["", ""], pb.GenerateResponse()
            with Client(
                (lambda: addresses) if discovered else addresses, timeout_s=60, resume_s=20
            ) as client:
                for count, last in enumerate(client.generate("the quick brown", **fields)):
                    for output in last.outputs:
                        tokens[output.index] += output.token_ids
                        text[output.index] += output.text
                    if count == stop_after:
                        stop_gateway()
            return tokens, text, last.usage.completion_tokens

        try:
            undisturbed = await asyncio.to_thread(ask, None)
            resumed = await asyncio.to_thread(ask, 20)
        finally:
            await other.stop(0)
    assert resumed == undisturbed
    assert [len(tokens) for tokens in resumed[0]] == [120, 120]


async def test_a_closed_client_resumes_nothing(llama_tokenizer: Tokenizer) -> None:
    async with serve(make_card(llama_tokenizer, LLAMA3), endless, step_s=0.005) as stack:

        def ask() -> float:
            client = Client(stack.address, timeout_s=30, resume_s=20)
            stream = client.generate("llama", max_tokens=400, ignore_eos=True)
            next(stream)
            client.close()
            start_s = time.monotonic()
            with pytest.raises(grpc.RpcError):
                list(stream)
            return time.monotonic() - start_s

        assert await asyncio.to_thread(ask) < 5
