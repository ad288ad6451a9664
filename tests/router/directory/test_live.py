"""Real engines, links and gateway's groups over fake slices: requests go where their prefix is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tokenizers import Tokenizer

from arriero.router.directory.directory import Reach
from arriero.router.directory.journal import Journal
from arriero.router.link.server import LinkServer
from arriero.router.routing import migration
from arriero.router.routing.linked_groups import GroupAddress, LinkedGroups
from arriero.router.routing.request_progress import RequestProgress
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.engine import Engine
from arriero.shards.engine.types import EngineConfig, EngineRequest, SequenceOutput
from arriero.shards.kv.blocks import model_root
from support.eventually import eventually_async
from support.fake_slice import FakeExecutor, answer
from support.frontdoor import make_card

CONFIG = EngineConfig(
    max_model_len=96, block_size=4, num_blocks=64, max_sequences=8, vocab_size=50, cache_salt=b"x"
)
PARAMS = SamplingParams(max_tokens=4, seed=0, ignore_eos=True)


class Group:
    """A group whose slices are a hash."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self.journal = Journal(CONFIG.num_blocks)
        self.engine = Engine(CONFIG, FakeExecutor(CONFIG), self.take, on_event=self.journal.note)
        card = make_card(
            tokenizer,
            None,
            group=name,
            cache_root=model_root(CONFIG.cache_salt),
            block_size=CONFIG.block_size,
            max_model_len=CONFIG.max_model_len,
        )
        self.link = LinkServer(self.engine, card, journal=self.journal)

    def take(self, outputs: Sequence[SequenceOutput]) -> None:
        self.link.on_outputs(outputs)

    async def start(self) -> GroupAddress:
        address = await self.link.start()
        self.engine.start()
        return GroupAddress(self.name, "m", address)

    async def stop(self) -> None:
        await self.link.stop(0.0)
        await asyncio.to_thread(self.engine.stop)


async def linked_to(addresses: list[GroupAddress]) -> LinkedGroups:
    linked = LinkedGroups(lambda: None)
    await linked.set_groups(addresses)
    await eventually_async(lambda: len(linked.groups()) >= len(addresses))
    return linked


async def run(
    linked: LinkedGroups, name: str, prompt: tuple[int, ...], salt: bytes = b""
) -> list[int]:
    request = EngineRequest(request_id=name, prompt=prompt, params=PARAMS, cache_salt=salt)
    text, _ = linked.find("m")
    tokens: list[int] = []
    steps = migration.run(
        linked, RequestProgress(request), lambda: linked.sharing("m", text, request), 5.0
    )
    async for outputs in steps:
        tokens += [token for one in outputs for token in one.tokens]
    assert tokens == answer(CONFIG, request, 0).tokens
    return tokens


def reach(linked: LinkedGroups, prompt: tuple[int, ...], salt: bytes = b"") -> dict[str, Reach]:
    request = EngineRequest(request_id="r", prompt=prompt, params=PARAMS, cache_salt=salt)
    text, _ = linked.find("m")
    return {view.group_id: view.reach for view in linked.sharing("m", text, request)}


async def test_requests_go_where_their_prefix_is(llama_tokenizer: Tokenizer) -> None:
    groups = [Group(f"g{i}", llama_tokenizer) for i in range(2)]
    addresses = [await group.start() for group in groups]
    linked = await linked_to(addresses)
    system = tuple(range(2, 40))
    try:
        for number in range(4):
            await run(linked, f"a{number}", (*system, number + 2))
            await eventually_async(lambda: reach(linked, (*system, 2, 3))["g0"].total == 36)
        stats = [group.engine.stats() for group in groups]
        assert [one.prompt_tokens for one in stats] == [4 * 39, 0]
        assert stats[0].cached_tokens == 3 * 36
        assert reach(linked, (*system, 2, 3)) == {"g0": Reach(36, 36), "g1": Reach(0, 0)}
        # a tenant that keeps its cache apart finds its own prompts alone, and nobody else does
        private = tuple(range(40, 2, -1))
        for number, cached in enumerate((0, 36)):
            before = groups[0].engine.stats().cached_tokens
            await run(linked, f"p{number}", (*private, 9), b"tenant a")
            assert groups[0].engine.stats().cached_tokens - before == cached
            await eventually_async(
                lambda: reach(linked, (*private, 9), b"tenant a")["g0"] == Reach(36, 36)
            )
        for salt in (b"", b"tenant b"):
            assert not reach(linked, (*private, 9), salt)["g0"].total
        # a gateway that comes later is told all
        late = await linked_to(addresses)
        await eventually_async(lambda: reach(late, (*system, 2, 3))["g0"] == Reach(36, 36), 5)
        await late.close()
        # what leaves the cache leaves the directory
        await asyncio.wrap_future(groups[0].engine.ask(lambda lanes: lanes.flush()))
        await eventually_async(lambda: not reach(linked, (*system, 2, 3))["g0"].total, 5)
        # and so does a group that ends
        await run(linked, "again", (*system, 9))
        await eventually_async(lambda: reach(linked, (*system, 9, 9))["g0"].total == 36)
    finally:
        await linked.close()
        for group in groups:
            await group.stop()
