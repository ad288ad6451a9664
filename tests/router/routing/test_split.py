"""Prompts in one group and what follows in another: real engines, slices, links and tiers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tokenizers import Tokenizer

from arriero.router.directory.journal import Journal
from arriero.router.link.leader_rpc import (
    GroupRole,
    PeerGroups,
    SharedBlocks,
    ask_leader,
    tell_shared,
)
from arriero.router.link.server import LinkServer
from arriero.router.roles import Role, assign
from arriero.router.routing import migration
from arriero.router.routing.linked_groups import GroupAddress, LinkedGroups
from arriero.router.routing.request_progress import RequestProgress
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import TierConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.engine.config import engine_config
from arriero.shards.engine.engine import Engine
from arriero.shards.engine.speculation.proposer import ProposerFactory
from arriero.shards.engine.types import EngineRequest, SequenceOutput
from arriero.shards.errors import InvalidRequest
from arriero.shards.kv.blocks import model_root
from arriero.shards.kv.host_id import host_name
from arriero.shards.layout.resolve import resolve
from arriero.shards.leader.local_executor import LocalExecutor
from support.eventually import eventually_async
from support.frontdoor import make_card
from support.models import tiny_llama, tiny_llama4
from support.processes import spawn_group

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=0)
DRAWN = SamplingParams(temperature=1.0, max_tokens=9, min_tokens=3, seed=7, n=2, top_p=0.9)


class Group:
    """A group with host memory for its blocks, over slices of its own."""

    def __init__(
        self,
        name: str,
        folder: str,
        tokenizer: Tokenizer,
        *,
        proposers: ProposerFactory | None = None,
        speculation: SpeculationConfig | None = None,
        **layout: int,
    ) -> None:
        checkpoint = Checkpoint.open(folder)
        config = GroupConfig(
            model_path=folder,
            dtype="float32",
            threads=1,
            num_blocks=64,
            max_model_len=256,
            max_sequences=4,
            max_batch_tokens=64,
            tiers=TierConfig(host_bytes=32 << 20),
            speculation=speculation or SpeculationConfig(),
            **layout,  # type: ignore[arg-type]
        )
        config = resolve(config, checkpoint.config)
        executor = LocalExecutor(config) if config.world_size == 1 else spawn_group(config)
        self.pids: list[int] = []
        if not isinstance(executor, LocalExecutor):
            self.pids = [rank.pid for rank in executor.wait_ready(60)]
        limits = engine_config(config, checkpoint.config, checkpoint.digest)
        journal = Journal(limits.num_blocks)
        self.name = name
        self.engine = Engine(
            limits, executor, self.take, on_event=journal.note, proposers=proposers
        )
        card = make_card(
            tokenizer,
            None,
            group=name,
            layout=str(layout),
            cache_root=model_root(limits.cache_salt),
            block_size=limits.block_size,
            memory=host_name(),
        )
        self.link = LinkServer(
            self.engine, card, kv=self.answer, journal=journal, peers=PeerGroups(), token=name
        )

    async def answer(self, action: str, asked: memoryview) -> SharedBlocks:
        assert action == "shared"
        return await tell_shared(self.engine, asked)

    def take(self, outputs: Sequence[SequenceOutput]) -> None:
        self.link.on_outputs(outputs)

    async def start(self) -> None:
        self.address = GroupAddress(self.name, "m", await self.link.start(), self.name)
        self.engine.start()
        await eventually_async(lambda: self.engine.stats().tiers, 60)

    async def become(self, role: str) -> None:
        leader = self.address.address, self.address.token
        wanted = GroupRole(role=role)
        assert await ask_leader(leader, None, "role", wanted, GroupRole, 5.0) == wanted

    async def stop(self) -> None:
        await self.link.stop(0.0)
        await asyncio.to_thread(self.engine.stop)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(path, layers=4, heads=6, kv_heads=3, hidden=96, head_dim=16)
    return str(path)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("chunked")
    tiny_llama4(path, layers=8, heads=6, kv_heads=3, chunk=64, max_positions=256)
    return str(path)


@asynccontextmanager
async def linked(groups: Sequence[Group]) -> AsyncIterator[LinkedGroups]:
    for group in groups:
        await group.start()
    links = LinkedGroups(lambda: None)
    await links.set_groups([group.address for group in groups])
    try:
        await eventually_async(lambda: len(links.groups()) >= len(groups), 20)
        yield links
    finally:
        await links.close()
        for group in groups:
            await group.stop()


async def told(links: LinkedGroups, roles: Mapping[str, str]) -> None:
    await eventually_async(lambda: {one.group_id: one.role for one in links.groups()} == roles, 5)


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


def prompts(seed: int, count: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(128) for _ in range(96 + 16 * i)) for i in range(count)]


async def ask(
    links: LinkedGroups,
    prompt: tuple[int, ...],
    params: SamplingParams = GREEDY,
    *,
    after: dict[int, Any] | None = None,
) -> tuple[list[list[int]], RequestProgress]:
    """Tokens of each sample; `after` has what to await once so many are out."""
    name = f"r{random.randrange(1 << 60)}"
    request = EngineRequest(request_id=name, prompt=prompt, params=params)
    text, _ = links.find("m")
    progress = RequestProgress(request)
    tokens: list[list[int]] = [[] for _ in range(params.n)]
    steps = migration.run(links, progress, lambda: links.sharing("m", text, request), 10.0)
    async with asyncio.timeout(60):
        async for outputs in steps:
            for one in outputs:
                tokens[one.index] += one.tokens
            for due in [n for n in after or {} if n <= len(tokens[0])]:
                await (after or {}).pop(due)()
    return tokens, progress


@pytest.mark.parametrize(
    ("model", "begins", "goes_on"),
    [
        ("folder", {}, {}),
        ("chunked", {}, {}),
        slow("folder", {}, {"tp": 2}),
        slow("folder", {"tp": 2}, {"tp": 3}),
        slow("folder", {"pp": 2}, {"tp": 2}),
        slow("chunked", {}, {"tp": 2}),
        slow("chunked", {"tp": 3}, {"pp": 2}),
    ],
    ids=str,
)
async def test_one_group_begins_and_the_other_goes_on(
    request: pytest.FixtureRequest,
    llama_tokenizer: Tokenizer,
    model: str,
    begins: dict[str, int],
    goes_on: dict[str, int],
) -> None:
    folder: str = request.getfixturevalue(model)
    first = Group("first", folder, llama_tokenizer, **begins)
    other = Group("other", folder, llama_tokenizer, **goes_on)
    whole = Group("whole", folder, llama_tokenizer)
    asked = prompts(1, 4)
    async with linked([whole]) as links:
        expected = [(await ask(links, one))[0] for one in asked]
        drawn = [(await ask(links, one, DRAWN))[0] for one in asked]
    async with linked([first, other]) as links:
        await first.become("prefill")
        await other.become("decode")
        await told(links, {"first": "prefill", "other": "decode"})
        for prompt, tokens in zip(asked, expected, strict=True):
            got, progress = await ask(links, prompt)
            assert got == tokens
            assert (progress.source, progress.num_migrations) == ("first", 0)
        stats = [group.engine.stats() for group in (first, other)]
        assert [one.output_tokens for one in stats] == [4, 4 * (GREEDY.max_tokens - 1)]
        # every full block of a prompt came over
        assert stats[1].cached_tokens == sum(len(one) // 16 * 16 for one in asked)
        hits = [len(one) // 16 for one in asked]
        live = sum(hit % 4 for hit in hits) if model == "chunked" else 0
        assert stats[1].tiers["loaded"] == sum(hits) + live
        if not (begins or goes_on):  # another layout may round another way, and draw another token
            for prompt, each in zip(asked, drawn, strict=True):
                assert (await ask(links, prompt, DRAWN))[0] == each
        one_token = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)
        got, progress = await ask(links, asked[0], one_token)
        assert got == [expected[0][0][:1]] and not progress.source
        # they change their parts, and nobody restarts
        await first.become("decode")
        await other.become("prefill")
        await told(links, {"first": "decode", "other": "prefill"})
        fresh = prompts(2, 2)
        assert {(await ask(links, one))[1].source for one in fresh} == {"other"}


async def test_a_side_that_is_gone_is_done_without(folder: str, llama_tokenizer: Tokenizer) -> None:
    groups = [Group(f"g{i}", folder, llama_tokenizer) for i in range(2)]
    whole = Group("whole", folder, llama_tokenizer)
    asked = prompts(3, 4)
    async with linked([whole]) as links:
        expected = [(await ask(links, one))[0] for one in asked]
    async with linked(groups) as links:
        begins, goes_on = groups
        await begins.become("prefill")
        await goes_on.become("decode")
        await told(links, {"g0": "prefill", "g1": "decode"})
        with pytest.raises(InvalidRequest, match="one of prefill, decode, both"):
            await begins.become("rest")
        # nobody is for prompts: those for what follows take them
        await begins.become("decode")
        await told(links, {"g0": "decode", "g1": "decode"})
        assert (await ask(links, asked[0]))[0] == expected[0]
        await begins.become("prefill")
        await told(links, {"g0": "prefill", "g1": "decode"})
        # it goes while it goes on: who began takes it back
        got, progress = await ask(links, asked[1], after={5: goes_on.stop})
        assert got == expected[1] and progress.num_migrations == 1
        # it is gone: who begins goes on
        got, progress = await ask(links, asked[2])
        assert got == expected[2] and not progress.source


def test_roles_are_kept_where_they_can_be() -> None:
    now: dict[str, Role] = dict.fromkeys(["a", "b", "c"], "both")
    first = assign(now, 1)
    assert first == {"a": "prefill", "b": "decode", "c": "decode"}
    assert assign({**first, "d": "both"}, 2) == {**first, "b": "prefill", "d": "decode"}
    without = {one: role for one, role in first.items() if one != "a"}
    after = assign(without, 1)
    assert after == {"b": "prefill", "c": "decode"}
    assert assign({"a": "both", **after}, 1) == {"a": "decode", **after}
    assert assign({"a": "prefill"}, 1) == {"a": "both"}
    assert assign(first, 0) == now
    assert sorted(assign(now, 9).values()) == ["decode", "prefill", "prefill"]
