"""KV events of a real engine: by VllmEngine, and the same on ZeroMQ."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import msgspec
import pytest
import zmq
import zmq.asyncio

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed: arriero[smg]")

from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as rpc
from smg_grpc_proto.generated import common_pb2 as common

from arriero.router.directory.journal import Journal
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.kv_events.zmq_publisher import END, KvEventsConfig
from arriero.router.link.server import LinkServer
from arriero.shards.config.group import GroupConfig
from arriero.shards.kv.blocks import model_root
from support.eventually import eventually_async
from support.frontdoor import CHATML, CHATML_SPECIALS, make_card, make_tokenizer
from support.groups import Group, running
from support.models import tiny_llama

VOCAB = 400
SIZE = 16
PROMPT = list(range(60, 100))


@dataclass
class Told:
    """A gateway that tells of a real engine's blocks."""

    group: Group
    gateway: Gateway
    stub: rpc.VllmEngineStub

    async def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        params = vllm.SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
        tokenized = vllm.TokenizedInput(input_ids=prompt)
        call = self.stub.Generate(
            vllm.GenerateRequest(request_id="r", tokenized=tokenized, sampling_params=params)
        )
        return list((await call.read()).complete.output_ids)


@asynccontextmanager
async def told(folder: Path) -> AsyncIterator[Told]:
    tokenizer = make_tokenizer(CHATML_SPECIALS)
    tiny_llama(folder, vocab=VOCAB, eos=1)
    tokenizer.save(str(folder / "tokenizer.json"))
    journal = Journal(64)
    config = GroupConfig(model_path=str(folder), dtype="float32", num_blocks=64, block_size=SIZE)
    with running(config, on_event=journal.note) as group:
        limits = group.engine.config
        card = make_card(
            tokenizer, CHATML, max_model_len=limits.max_model_len, vocab_size=VOCAB,
            cache_root=model_root(limits.cache_salt), block_size=limits.block_size,
        )  # fmt: skip
        link = LinkServer(group.engine, card, journal=journal)
        group.take = link.on_outputs  # type: ignore[method-assign]
        sockets = KvEventsConfig(publish="tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0")
        gateway = Gateway(GatewayConfig(vllm_engine="", kv_events=sockets))
        port = await gateway.start()
        await gateway.set_groups([GroupAddress("g0", "tiny", await link.start())])
        try:
            await eventually_async(lambda: gateway.ready, 30)
            async with (
                asyncio.timeout(60),
                grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            ):
                yield Told(group, gateway, rpc.VllmEngineStub(channel))
        finally:
            await gateway.stop(0.2)
            await link.stop(0.2)


class Reader:
    """What a subscriber knows: tokens of blocks on the device, by hash."""

    def __init__(self, call: grpc.aio.UnaryStreamCall) -> None:
        self._call = call
        self.blocks: dict[int, list[int]] = {}
        self.parents: dict[int, int | None] = {}
        self.numbers: list[int] = []
        self.snapshots = 0

    async def read(self, count: int) -> None:
        """Read until `count` blocks are known."""
        while len(self.blocks) != count:
            batch = await self._call.read()
            self._add(batch)

    def _add(self, batch: common.KvEventBatch) -> None:
        assert batch.HasField("load"), "each batch has the load"
        if batch.load.load_only:
            assert batch.sequence_number == (self.numbers[-1] if self.numbers else 0)
            return
        if self.numbers:
            assert batch.sequence_number == self.numbers[-1] + 1, "a gap"
        self.numbers.append(batch.sequence_number)
        self.snapshots += batch.HasField("snapshot")
        for event in batch.events:
            kind = event.WhichOneof("data")
            if kind == "stored":
                assert event.stored.tier == common.KV_CACHE_TIER_DEVICE
                parent = event.stored.parent_block_hash
                before = parent if event.stored.HasField("parent_block_hash") else None
                for block in event.stored.blocks:
                    assert block.block_size == SIZE == len(block.token_ids)
                    self.blocks[block.block_hash] = list(block.token_ids)
                    self.parents[block.block_hash] = before
                    before = block.block_hash
            elif kind == "removed":
                for key in event.removed.block_hashes:
                    del self.blocks[key]
            else:
                self.blocks.clear()

    def chain(self) -> list[int]:
        """Tokens of the only chain, by the blocks' parents."""
        children = {self.parents[key]: key for key in self.blocks}
        tokens, key = [], children.get(None)
        while key is not None:
            tokens += self.blocks[key]
            key = children.get(key)
        return tokens


async def test_subscribers_learn_blocks_with_their_tokens(tmp_path: Path) -> None:
    async with told(tmp_path) as gateway:
        first = Reader(gateway.stub.SubscribeKvEvents(common.SubscribeKvEventsRequest()))
        output = await gateway.generate(PROMPT, 20)
        await first.read(3)
        assert first.chain() == [*PROMPT, *output][: 3 * SIZE]
        # a later subscriber gets all held blocks at once, then goes on without a gap
        late = Reader(gateway.stub.SubscribeKvEvents(common.SubscribeKvEventsRequest()))
        await late.read(3)
        assert late.snapshots and late.blocks == first.blocks
        # and one that has read some before gets the rest
        resumed = Reader(
            gateway.stub.SubscribeKvEvents(
                common.SubscribeKvEventsRequest(start_sequence_number=first.numbers[0])
            )
        )
        await resumed.read(3)
        assert not resumed.snapshots and resumed.blocks == first.blocks
        longer = [*PROMPT, *output, *range(100, 120)]
        await gateway.generate(longer, 2)
        for reader in (first, late, resumed):
            await reader.read(5)
            assert reader.chain() == longer[: 5 * SIZE]
        # what leaves the cache is removed, and the loss of the last group clears all
        await asyncio.wrap_future(gateway.group.engine.ask(lambda scheduler: scheduler.flush()))
        await late.read(0)
        await gateway.generate(longer, 2)
        await late.read(5)
        await gateway.gateway.set_groups([])
        await late.read(0)


async def test_zeromq_tells_the_same(tmp_path: Path) -> None:
    context = zmq.asyncio.Context()
    try:
        async with told(tmp_path) as gateway:
            reader = context.socket(zmq.DEALER)
            reader.connect(gateway.gateway.kv_addresses[1])
            output = await gateway.generate(PROMPT, 20)

            async def replay() -> list[list[object]]:
                await reader.send_multipart([b"", (1).to_bytes(8, "big")])
                events: list[list[object]] = []
                while True:
                    _, _, number, payload = await reader.recv_multipart()
                    if number == END:
                        return events
                    events += msgspec.msgpack.decode(payload)[1]

            tokens: list[int] = []
            while len(tokens) < 3 * SIZE:
                events = await replay()
                tokens = [token for event in events for token in event[3]]  # type: ignore[attr-defined]
                await asyncio.sleep(0.05)
            assert tokens == [*PROMPT, *output][: 3 * SIZE]
            assert {(event[0], event[4], event[6]) for event in events} == {
                ("BlockStored", SIZE, "GPU")
            }
            assert events[0][2] is None
    finally:
        context.destroy(linger=0)
