"""Client, gateway, link and the real engine on a real checkpoint, in one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.model_card import ModelCard
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.eventually import eventually_async
from support.groups import Group, running

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
pytestmark = pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder")


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with running(GroupConfig(model_path=MODEL, max_model_len=1024, dtype="float32")) as started:
        yield started


async def test_the_gateway_says_what_the_engine_says(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = group.engine
    limits = engine.config
    card = ModelCard.from_folder(
        MODEL,
        model="small",
        group="g0",
        layout="tp1",
        digest="d",
        max_model_len=limits.max_model_len,
        vocab_size=limits.vocab_size,
        bos_token_id=1,
        eos_token_ids=limits.eos_token_ids,
        max_sequences=8,
    )
    talk = [{"role": "user", "content": "Name three animals of the Andes."}]
    link = LinkServer(engine, card)
    gateway = Gateway(GatewayConfig())
    port = await gateway.start()
    await gateway.set_groups([GroupAddress("g0", "small", await link.start())])
    async with AsyncClient(f"127.0.0.1:{port}", timeout_s=120) as client, asyncio.timeout(200):
        await eventually_async(lambda: gateway.ready, 120)
        laid_out = await client.tokenize(
            pb.TokenizeRequest(conversation=pb.Conversation(messages=[pb.Message(**talk[0])]))
        )
        params = SamplingParams(max_tokens=24, temperature=0.0, seed=1)
        direct = await asyncio.to_thread(group.generate, [list(laid_out.token_ids)], params)
        monkeypatch.setattr(group, "take", link.on_outputs)

        responses = [r async for r in client.chat(talk, max_tokens=24, temperature=0.0)]
        ids = [i for r in responses for o in r.outputs for i in o.token_ids]
        assert ids == direct[0].tokens
        text = "".join(o.text for r in responses for o in r.outputs)
        assert text.strip()

        async def one(number: int) -> int:
            count = 0
            stream = client.generate(f"Story {number}:", max_tokens=40, seed=number)
            async for response in stream:
                count += sum(len(o.token_ids) for o in response.outputs)
                if number % 3 == 0 and count >= 4:
                    await stream.aclose()
            return count

        counts = await asyncio.gather(*(one(number) for number in range(16)))
        assert all(4 <= count <= 40 for count in counts)
        await eventually_async(
            lambda: not engine.stats().num_running and not engine.stats().num_waiting, 120
        )
        assert engine.stats().blocks_used == 0
    await gateway.stop(1)
    await link.stop(1)
