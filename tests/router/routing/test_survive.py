"""Streams whose group is lost go on in another, token for token, text for text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import grpc.aio
import pytest

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.engine.sequence import sample_seed
from arriero.shards.engine.types import EngineRequest, SequenceOutput
from arriero.shards.errors import Unavailable
from support.eventually import eventually_async
from support.frontdoor import CHATML, CHATML_SPECIALS, FakeEngine, make_card, make_tokenizer

CARD = make_card(make_tokenizer(CHATML_SPECIALS), CHATML)


def by_seed_and_position(request: EngineRequest, index: int, position: int) -> int:
    """As the contract asks: a function of seed, prompt and position alone."""
    seed = sample_seed(request.params.seed or 0, index)
    return 60 + (seed * 31 + len(request.prompt) * 7 + position * 11) % 300


class Group:
    """A leader's link over an engine of policy; it can be lost in the ways a leader can."""

    def __init__(self, group_id: str, *, digest: str = "d", layout: str = "tp1") -> None:
        self.card = replace(CARD, group=group_id, digest=digest, layout=layout)
        self.engine = FakeEngine(by_seed_and_position, step_s=0.004)
        self.link = LinkServer(self.engine, self.card)
        self.engine.on_outputs = self.link.on_outputs
        self.address = ""

    async def start(self) -> GroupAddress:
        self.address = await self.link.start()
        return GroupAddress(self.card.group, self.card.model, self.address)

    async def die(self) -> None:
        """As a killed process: its sockets close."""
        assert self.link._server is not None
        self.link._server.close()
        for link in list(self.link._links):
            link.connection.abort("")

    async def close(self) -> None:
        await self.link.stop(0)
        self.engine.close()


@dataclass
class Stack:
    gateway: Gateway
    client: AsyncClient
    groups: list[Group]
    addresses: list[GroupAddress]

    async def ready(self, count: int) -> None:
        await eventually_async(lambda: len(self.gateway._groups.groups()) >= count, 20)


@asynccontextmanager
async def serving(*groups: Group, lost_s: float = 10.0) -> AsyncIterator[Stack]:
    gateway = Gateway(GatewayConfig(lost_s=lost_s))
    port = await gateway.start()
    addresses = [await group.start() for group in groups]
    await gateway.set_groups(addresses)
    client = AsyncClient(f"127.0.0.1:{port}", timeout_s=60)
    stack = Stack(gateway, client, list(groups), addresses)
    try:
        await stack.ready(len(groups))
        yield stack
    finally:
        await client.close()
        await gateway.stop(0.2)
        for group in stack.groups:
            await group.close()


FIELDS = {"max_tokens": 120, "temperature": 0.7, "seed": 5, "ignore_eos": True}


class Read:
    """What a client got: tokens and text by sample."""

    def __init__(self, n: int = 1) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.text = [""] * n
        self.reasons = [0] * n
        self.messages: list[pb.GenerateResponse] = []

    def add(self, message: pb.GenerateResponse) -> None:
        self.messages.append(message)
        for one in message.outputs:
            self.tokens[one.index] += one.token_ids
            self.text[one.index] += one.text
            self.reasons[one.index] = one.finish_reason

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Read)
        return (self.tokens, self.text, self.reasons) == (other.tokens, other.text, other.reasons)


async def undisturbed(prompt: str, n: int, **fields: object) -> Read:
    async with serving(Group("calm")) as stack:
        read = Read(n)
        async for message in stack.client.generate(prompt, **fields, n=n):
            read.add(message)
        return read


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_goes_on_where_its_group_died(n: int) -> None:
    whole = await undisturbed("the quick brown", n, **FIELDS)
    async with serving(Group("a"), Group("b")) as stack:
        read = Read(n)
        async for message in stack.client.generate("the quick brown", **FIELDS, n=n):
            read.add(message)
            if len(read.messages) == 20:
                await stack.groups[0].die()  # ties go to the smallest id
    assert read == whole
    assert stack.groups[1].engine.submitted
    assert [len(one) for one in read.tokens] == [120] * n
    usage = read.messages[-1].usage
    assert usage.completion_tokens == 120 * n


async def test_stop_strings_across_the_loss() -> None:
    """A stop string begun in one group is complete in the other."""
    plain = await undisturbed("the quick brown", 1, **FIELDS)
    stop = plain.text[0][60:75]
    whole = await undisturbed("the quick brown", 1, **FIELDS, stop=[stop])
    assert len(whole.tokens[0]) < 120
    for at in (
        1,
        2,
        len(whole.messages) // 2,
        *range(len(whole.messages) - 7, len(whole.messages)),
    ):
        async with serving(Group("a"), Group("b")) as stack:
            read = Read()
            async for message in stack.client.generate("the quick brown", **FIELDS, stop=[stop]):
                read.add(message)
                if len(read.messages) == at:
                    await stack.groups[0].die()
        assert read == whole, f"lost after message {at}"


async def test_a_loss_told_by_the_engine() -> None:
    """An engine that fails ends its requests as lost; nothing is left to wait for."""
    whole = await undisturbed("the quick brown", 1, **FIELDS)
    first = Group("a")
    async with serving(first, Group("b")) as stack:
        read = Read()
        async for message in stack.client.generate("the quick brown", **FIELDS):
            read.add(message)
            if len(read.messages) == 10:
                lose_all(first)
    assert read == whole


def lose_all(group: Group) -> None:
    for request_id in list(group.engine.running):
        group.engine.cancel(request_id)
        lost = SequenceOutput(
            request_id=request_id, index=0, finish_reason="lost", error="slice 1 died"
        )
        group.link.on_outputs([lost])


async def test_a_stream_waits_for_the_rebuilt_group() -> None:
    whole = await undisturbed("the quick brown", 1, **FIELDS)
    async with serving(Group("a.1")) as stack:
        read = Read()
        async for message in stack.client.generate("the quick brown", **FIELDS):
            read.add(message)
            if len(read.messages) == 10:
                await stack.groups[0].die()
                rebuilt = Group("a.2")
                stack.groups.append(rebuilt)

                async def rebuild(rebuilt: Group = rebuilt) -> None:
                    await asyncio.sleep(0.5)
                    await stack.gateway.set_groups([await rebuilt.start()])

                rebuilding = asyncio.create_task(rebuild())
        await rebuilding
    assert read == whole


async def test_other_weights_never_go_on() -> None:
    """Waits for a group of its own digest, and says so when none comes."""
    async with serving(Group("a"), Group("b", digest="other"), lost_s=0.5) as stack:
        read = Read()
        with pytest.raises(Unavailable, match=r"no other group continued it within 0\.5 s"):
            async for message in stack.client.generate("the quick brown", **FIELDS):
                read.add(message)
                if len(read.messages) == 10:
                    await stack.groups[0].die()
        assert stack.groups[1].engine.submitted == []


async def test_the_same_layout_goes_first() -> None:
    groups = Group("a", layout="tp2"), Group("b", layout="tp1"), Group("c", layout="tp2")
    async with serving(*groups) as stack:
        count = 0
        async for _ in stack.client.generate("the quick brown", **FIELDS):
            count += 1
            if count == 10:
                await groups[0].die()
    assert groups[2].engine.submitted and not groups[1].engine.submitted


async def test_a_drained_group_hands_its_streams_over() -> None:
    whole = await undisturbed("the quick brown", 1, **FIELDS)
    async with serving(Group("a"), Group("b")) as stack:
        read = Read()
        async for message in stack.client.generate("the quick brown", **FIELDS):
            read.add(message)
            if len(read.messages) == 10:
                stopping = asyncio.create_task(stack.groups[0].link.stop(0.05))
        await stopping
    assert read == whole
    assert stack.groups[1].engine.submitted


async def test_a_forgotten_group_stays_while_its_link_is_up() -> None:
    async with serving(Group("a")) as stack:
        read = Read()
        async for message in stack.client.generate("the quick brown", **FIELDS):
            read.add(message)
            if len(read.messages) == 10:
                await stack.gateway.set_groups([], fenced=())
        assert len(read.tokens[0]) == 120
        await stack.gateway.set_groups([], fenced={"a"})
        assert not stack.gateway.ready


async def test_another_group_at_the_same_address_is_not_heard() -> None:
    async with serving(Group("a")) as stack:
        other = GroupAddress("someone-else", "tiny", stack.addresses[0].address)
        await stack.gateway.set_groups([other])
        await asyncio.sleep(0.3)
        assert not stack.gateway.ready


@pytest.mark.parametrize("discovered", [False, True])
async def test_a_client_takes_its_stream_up_at_another_gateway(discovered: bool) -> None:
    """The first gateway goes; tokens, text and end are as they would have been.

    The other one is known from the start, or there only once the first is gone.
    """
    fields = {**FIELDS, "n": 2, "stop": ["qzx"]}
    whole = await undisturbed("the quick brown", 2, **{k: v for k, v in fields.items() if k != "n"})
    async with serving(Group("a")) as stack:
        other = Gateway(GatewayConfig())
        port = await other.start()
        await other.set_groups(stack.addresses)
        there = [stack.client._address]
        if not discovered:
            there.append(f"127.0.0.1:{port}")
        client = AsyncClient((lambda: there) if discovered else there, timeout_s=60, resume_s=20)
        try:
            read = Read(2)
            async for message in client.generate("the quick brown", **fields):
                read.add(message)
                if len(read.messages) == 20:
                    if discovered:
                        there[:] = [f"127.0.0.1:{port}"]
                    await stack.gateway.stop(0)
        finally:
            await client.close()
            await other.stop(0)
    assert read == whole
    assert read.messages[-1].usage.completion_tokens == 240
    assert sum(message.HasField("start") for message in read.messages) == 2


async def test_resumed_is_checked() -> None:
    async with serving(Group("a")) as stack:
        resumed = pb.Resumed(weights="d ", samples=[pb.ResumedSample(index=0, token_ids=[70])])
        for wrong, match in (
            ({}, "`resumed` needs `seed`"),
            ({"seed": 1, "n": 1, "samples": [(5, [1])]}, "must be unique and below `n`=1"),
            ({"seed": 1, "samples": [(0, [2**20])]}, "no token of the model"),
            ({"seed": 1, "samples": [(0, [70] * 5)]}, "`max_tokens` is 4"),
            ({"seed": 1, "samples": [(0, [70] * 4)]}, "nothing is left"),
        ):
            given = pb.Resumed()
            given.CopyFrom(resumed)
            if "samples" in wrong:
                del given.samples[:]
                for index, tokens in wrong["samples"]:
                    given.samples.add(index=index, token_ids=tokens)
            request = pb.GenerateRequest(text="a", resumed=given)
            request.sampling.max_tokens = 4
            if "seed" in wrong:
                request.sampling.seed = 1
            with pytest.raises(grpc.aio.AioRpcError, match=match):
                async for _ in stack.client._stub.Generate(request, timeout=20):
                    pass


async def test_a_kept_call_is_taken_up_by_its_id() -> None:
    whole = await undisturbed("the quick brown", 1, **FIELDS)
    async with serving(Group("a")) as stack:
        read = Read()
        fields = {**FIELDS, "request_id": "mine", "resumable_s": 5}
        async for message in stack.client.generate("the quick brown", **fields):
            read.add(message)
            if len(read.messages) == 10:
                break
        await asyncio.sleep(0.2)  # it runs on meanwhile
        again = pb.ResumeRequest(request_id="mine", received=10)
        async for message in stack.client._stub.Resume(again, timeout=20):
            read.add(message)
        assert read == whole
        late = Read()  # and once more, after its end
        again = pb.ResumeRequest(request_id="mine", received=0)
        async for message in stack.client._stub.Resume(again, timeout=20):
            late.add(message)
        assert late == whole
        for wrong in (
            pb.ResumeRequest(request_id="other"),
            pb.ResumeRequest(request_id="mine", received=1000),
        ):
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in stack.client._stub.Resume(wrong, timeout=20):
                    pass


async def test_a_kept_call_that_nobody_takes_up_is_cancelled() -> None:
    async with serving(Group("a")) as stack:
        fields = {**FIELDS, "max_tokens": 400, "request_id": "mine", "resumable_s": 1}
        async for _ in stack.client.generate("the quick brown", **fields):
            break
        await eventually_async(lambda: stack.groups[0].engine.cancelled, 5)
        with pytest.raises(grpc.aio.AioRpcError, match="stores no call 'mine'"):
            async for _ in stack.client._stub.Resume(pb.ResumeRequest(request_id="mine")):
                pass
