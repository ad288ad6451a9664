"""Tokens are the same with and without each tier, across restarts, and across layouts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import RowType, TierConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.kv.blocks import chain_keys, root_key
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.packed_rows import pack, unpack
from arriero.shards.kv.transfers import Pool
from arriero.shards.protocol import wire
from arriero.shards.protocol.step_plan import int32
from support.eventually import eventually
from support.groups import Group, running
from support.models import tiny_llama, tiny_llama4

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(path, layers=4, heads=6, kv_heads=3, hidden=96, head_dim=16)
    return str(path)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Six prompts of 100 to 200 tokens; together they do not fit the small pool."""
    rng = random.Random(5)
    return [[rng.randrange(128) for _ in range(100 + 20 * i)] for i in range(6)]


def small(model: str, tiers: TierConfig, **more: object) -> GroupConfig:
    settings: dict[str, object] = {"num_blocks": 24, "max_model_len": 256, "max_sequences": 4}
    settings |= more
    return GroupConfig(model_path=model, dtype="float32", threads=1, tiers=tiers, **settings)  # type: ignore[arg-type]


def opened(group: Group) -> None:
    """Wait until every rank has said what its tiers hold; requests do not wait for that."""
    eventually(lambda: group.engine.stats().tiers, 20)


def one_by_one(group: Group, prompts: list[list[int]]) -> list[list[int]]:
    return [group.generate([prompt], GREEDY)[0].tokens for prompt in prompts]


def one_by_one_kept(group: Group, prompts: list[list[int]]) -> list[list[int]]:
    """Each when the blocks of the one before are saved: in a hurry some would be evicted first."""
    tokens = []
    for prompt in prompts:
        tokens += one_by_one(group, [prompt])
        settled(group)
    return tokens


def settled(group: Group) -> dict[str, int]:
    """Counts of the tiers, once nothing moves."""
    idle = 0

    def still() -> dict[str, int] | None:
        nonlocal idle
        tiers = group.engine.stats().tiers
        idle = 0 if tiers.get("moving", 1) else idle + 1
        # five times: a snapshot may fall between a move's being taken up and its being sent
        return tiers if idle >= 5 else None

    tiers = eventually(still, 20, state=lambda: group.engine.stats().tiers)
    assert tiers is not None
    return tiers


@pytest.fixture(scope="module")
def expected(model: str, prompts: list[list[int]]) -> list[list[int]]:
    with running(small(model, TierConfig(), num_blocks=256, prefix_cache=False)) as group:
        return one_by_one(group, prompts)


def test_host(model: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    with running(small(model, TierConfig(host_bytes=64 << 20))) as group:
        assert one_by_one_kept(group, prompts) == expected
        assert one_by_one(group, prompts) == expected
        counts = settled(group)
        assert counts["loaded"] > 20 and not counts["failed"]
        stats = group.engine.stats()
        assert stats.cached_tokens == sum((len(one) - 1) // 16 * 16 for one in prompts)
        assert stats.blocks_used == 0


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("before", "after", "host"),
    [
        ({}, {}, 0),
        ({}, {}, 64 << 20),
        ({}, {"tp": 2}, 0),
        slow({"tp": 2}, {"tp": 3}, 0),
        slow({"tp": 3}, {"tp": 2}, 0),
        slow({"tp": 2}, {"pp": 2}, 0),
        slow({}, {"pp": 2}, 0),
        slow({"pp": 2}, {}, 64 << 20),
    ],
    ids=str,
)
def test_disk_outlives_the_group(
    model: str,
    prompts: list[list[int]],
    expected: list[list[int]],
    tmp_path: Path,
    before: dict[str, int],
    after: dict[str, int],
    host: int,
) -> None:
    tiers = TierConfig(host_bytes=host, disk_path=str(tmp_path), disk_bytes=64 << 20)
    with running(small(model, tiers, **before)) as group:
        assert one_by_one_kept(group, prompts) == expected
        assert settled(group)["disk"] == sum((len(one) + 7) // 16 for one in prompts)
    with running(small(model, tiers, **after)) as group:
        opened(group)
        assert one_by_one(group, prompts) == expected
        counts = settled(group)
        assert not counts["failed"]
        assert group.engine.stats().cached_tokens == sum(
            (len(one) - 1) // 16 * 16 for one in prompts
        )


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama4")
    tiny_llama4(path, layers=8, heads=6, kv_heads=3, chunk=64, max_positions=256)
    return str(path)


@pytest.fixture(scope="module")
def expected4(llama4: str, prompts: list[list[int]]) -> list[list[int]]:
    with running(small(llama4, TierConfig(), num_blocks=256, prefix_cache=False)) as group:
        return one_by_one(group, prompts)


POOLS = {"num_blocks": 24, "num_local_blocks": 12}
"""Of a small group with layers that attend within their chunk."""


@pytest.mark.parametrize(
    "layouts",
    [
        ({}, {"tp": 2}),
        slow(({"tp": 2}, {"tp": 3})),
        slow(({"tp": 2}, {"pp": 2})),
        slow(({"pp": 2}, {})),
    ],
    ids=str,
)
def test_llama4_brings_up_no_more_than_the_live_chunk(
    llama4: str,
    prompts: list[list[int]],
    expected4: list[list[int]],
    tmp_path: Path,
    layouts: tuple[dict[str, int], ...],
) -> None:
    """Both pools go through the tiers; of chunk-local layers only what can still be seen."""
    tiers = TierConfig(host_bytes=64 << 20, disk_path=str(tmp_path), disk_bytes=64 << 20)
    before, after = layouts
    with running(small(llama4, tiers, **POOLS, **before)) as group:
        assert one_by_one_kept(group, prompts) == expected4
        assert not settled(group)["failed"]
        assert one_by_one(group, prompts) == expected4  # from host memory
    with running(small(llama4, tiers, **POOLS, **after)) as group:
        opened(group)
        assert one_by_one(group, prompts) == expected4
        counts = settled(group)
        stats = group.engine.stats()
        hits = [(len(one) - 1) // 16 for one in prompts]
        assert stats.cached_tokens == 16 * sum(hits)
        assert counts["loaded"] == sum(hits) + sum(hit % 4 for hit in hits)
        assert not counts["failed"] and not stats.blocks_used and not stats.local_blocks_used


def shared(group: Group, prompt: list[int]) -> dict[Pool, PeerBlocks]:
    """What a group has of a prompt in its memory, as another group's leader is told."""
    root = root_key(group.engine.config.cache_salt)
    keys = list(chain_keys(root, int32(prompt), 16))
    found = group.engine.ask(lambda lanes: lanes.shared(keys)).result(10)
    return {pool: wire.decode(wire.encode(one), PeerBlocks) for pool, one in found.items()}


def elsewhere(told: dict[Pool, PeerBlocks]) -> dict[Pool, PeerBlocks]:
    """The same as a group on another node is told: memory that is there, but not here."""
    return {
        pool: replace(one, segments=tuple(replace(part, host="") for part in one.segments))
        for pool, one in told.items()
    }


@pytest.mark.parametrize(
    "layouts",
    [
        ({"tp": 2}, {}),
        slow(({}, {"tp": 3})),
        slow(({"tp": 2}, {"tp": 3})),
        slow(({"tp": 3}, {"tp": 2})),
        slow(({"pp": 2}, {"tp": 3})),
        slow(({}, {"pp": 2})),
        slow(({"pp": 2}, {})),
    ],
    ids=str,
)
def test_blocks_come_from_another_group_s_memory(
    model: str,
    prompts: list[list[int]],
    expected: list[list[int]],
    layouts: tuple[dict[str, int], ...],
) -> None:
    tiers = TierConfig(host_bytes=64 << 20)
    there, here = layouts
    hits = [(len(one) - 1) // 16 for one in prompts]
    with running(small(model, tiers, **here)) as group:
        with running(small(model, tiers, **there)) as other:
            assert one_by_one_kept(other, prompts) == expected
            told = [shared(other, prompt) for prompt in prompts]
            told[1], told[3], told[5] = elsewhere(told[1]), elsewhere(told[3]), elsewhere(told[5])
            for prompt, peer, tokens in zip(prompts[:4], told, expected, strict=False):
                (answer,) = group.wait([group.submit(prompt, GREEDY, peer=peer)])
                assert answer.tokens == tokens
            assert settled(group)["loaded"] == sum(hits[:4])
            # of the fifth prompt the memory has been given to others meanwhile: a miss
            other.engine.ask(lambda lanes: lanes.flush()).result(10)
            one_by_one_kept(other, [one[::-1] for one in prompts])
            (answer,) = group.wait([group.submit(prompts[4], GREEDY, peer=told[4])])
            assert answer.tokens == expected[4]
        # and of the sixth the group has ended
        (answer,) = group.wait([group.submit(prompts[5], GREEDY, peer=told[5])])
        assert answer.tokens == expected[5]
        settled(group)
        assert group.engine.stats().blocks_used == 0


@pytest.mark.parametrize(
    "layouts",
    [
        ({}, {}),
        slow(({}, {"tp": 2})),
        slow(({"tp": 2}, {"tp": 3})),
        slow(({"tp": 3}, {})),
        slow(({}, {"pp": 2})),
        slow(({"pp": 2}, {"tp": 2})),
    ],
    ids=str,
)
def test_llama4_pulls_both_pools(
    llama4: str,
    prompts: list[list[int]],
    expected4: list[list[int]],
    layouts: tuple[dict[str, int], ...],
) -> None:
    tiers = TierConfig(host_bytes=64 << 20)
    before, after = layouts
    with running(small(llama4, tiers, **POOLS, **before)) as there:
        assert one_by_one_kept(there, prompts) == expected4
        with running(small(llama4, tiers, **POOLS, **after)) as group:
            opened(group)
            for prompt, tokens in zip(prompts, expected4, strict=True):
                told = shared(there, prompt)
                told = elsewhere(told) if len(prompt) % 40 else told
                asked = group.submit(prompt, GREEDY, peer=told)
                assert group.wait([asked])[0].tokens == tokens
            hits = [(len(one) - 1) // 16 for one in prompts]
            assert settled(group)["loaded"] == sum(hits) + sum(hit % 4 for hit in hits)


def test_each_data_parallel_rank_has_tiers(
    llama4: str, prompts: list[list[int]], expected4: list[list[int]], tmp_path: Path
) -> None:
    tiers = TierConfig(host_bytes=64 << 20, disk_path=str(tmp_path), disk_bytes=64 << 20)

    def in_pairs(group: Group) -> list[list[int]]:
        tokens = []
        for pair in (prompts[:2], prompts[2:4], prompts[4:]):  # one for each rank
            tokens += [one.tokens for one in group.generate(pair, GREEDY)]
            settled(group)
        return tokens

    with running(small(llama4, tiers, **POOLS, dp=2)) as group:
        opened(group)
        assert in_pairs(group) == expected4
        assert in_pairs(group) == expected4
        report = group.engine.ask(lambda lanes: lanes.cache()).result(10)
        assert report.tiers["host"].used == sum(report.tenant_blocks["host"].values()) > 0
        with running(small(llama4, TierConfig(host_bytes=64 << 20), **POOLS)) as other:
            for prompt, tokens in zip(prompts, expected4, strict=True):
                told = shared(group, prompt)
                assert other.wait([other.submit(prompt, GREEDY, peer=told)])[0].tokens == tokens
            counts = settled(other)
            assert counts["loaded"] and not counts["failed"]
    with running(small(llama4, tiers, **POOLS, dp=2)) as group:
        opened(group)
        assert in_pairs(group) == expected4
        counts = settled(group)
        assert counts["loaded"] and not counts["failed"]


@pytest.mark.parametrize(
    "layouts", [({}, {}), slow(({"tp": 2}, {"tp": 3})), slow(({"pp": 2}, {"tp": 2}))], ids=str
)
@pytest.mark.parametrize("chunked", [False, True], ids=["llama", "llama4"])
def test_shared_store(
    request: pytest.FixtureRequest,
    prompts: list[list[int]],
    tmp_path: Path,
    chunked: bool,
    layouts: tuple[dict[str, int], ...],
) -> None:
    model: str = request.getfixturevalue("llama4" if chunked else "model")
    expected = request.getfixturevalue("expected4" if chunked else "expected")
    tiers, pools = TierConfig(shared_url=f"file://{tmp_path}/store"), POOLS if chunked else {}
    before, after = layouts
    with running(small(model, tiers, **pools, **before)) as group:
        assert one_by_one_kept(group, prompts) == expected
    with running(small(model, tiers, **pools, **after)) as group:
        opened(group)
        assert one_by_one(group, prompts) == expected
        hits = [(len(one) - 1) // 16 for one in prompts]
        live = sum(hit % 4 for hit in hits) if chunked else 0
        assert settled(group)["loaded"] == sum(hits) + live


@pytest.mark.parametrize("dtype", ["int8", slow("fp8")])
def test_blocks_in_a_byte_a_number_are_the_same_whoever_reads_them(
    model: str, prompts: list[list[int]], tmp_path: Path, dtype: RowType
) -> None:
    """What came up is saved again as it was, and every layout reads the same numbers."""
    tiers = TierConfig(disk_path=str(tmp_path), disk_bytes=64 << 20, dtype=dtype)
    with running(small(model, tiers)) as group:
        one_by_one_kept(group, prompts)
        assert not settled(group)["failed"]
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*.kv")}
    assert {len(data) for data in files.values()} == {64 + 4 * 2 * 3 * 16 * (16 + 4)}
    answers = []
    for layout in ({}, {"tp": 2}):
        with running(small(model, tiers, **layout)) as group:
            opened(group)
            answers.append(one_by_one(group, prompts))
            assert settled(group)["loaded"] == sum((len(one) - 1) // 16 for one in prompts)
    assert answers[0] == answers[1]
    exact = TierConfig(disk_path=str(tmp_path), disk_bytes=64 << 20)
    with running(small(model, exact)) as group:  # they are not for a group that keeps every bit
        opened(group)
        assert not settled(group)["disk"]
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*.kv") if p.name in files} == files


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.5001 / 127), ("fp8", 0.5001 / 14)])
def test_rows_in_a_byte_a_number(dtype: RowType, most: float) -> None:
    """Off by half a level at most: of fp8's 448, the levels near the greatest are 32 apart."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(5, 2, 3, 16, 64, generator=generator) * 10
    data[0, 0, 0, 0] = 0.0
    packed = pack(data, dtype)
    assert packed.dtype == torch.int8 and packed.shape == (5, 2, 3, 16, 68)
    found = unpack(packed, dtype)
    assert ((found - data).abs() <= data.abs().amax(-1, keepdim=True) * most).all()
    if dtype == "fp8":  # and each number by a sixteenth of itself, but for the very small
        normal = data.abs() > data.abs().amax(-1, keepdim=True) / 2**14
        assert ((found - data).abs()[normal] <= data.abs()[normal] * 0.0626).all()
    torch.testing.assert_close(unpack(pack(found, dtype), dtype), found)
    assert torch.equal(pack(found, dtype)[..., :-4], packed[..., :-4])


def test_spoilt_files_are_computed_again(
    model: str, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    tiers = TierConfig(disk_path=str(tmp_path), disk_bytes=64 << 20)
    with running(small(model, tiers)) as group:
        one_by_one(group, prompts)
        settled(group)
    rng = random.Random(1)
    for number, path in enumerate(sorted(tmp_path.rglob("*.kv"))):
        data = bytearray(path.read_bytes())
        match number % 4:
            case 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                data = data[: rng.randrange(len(data))]
            case 2:
                path.unlink()
                continue
        path.write_bytes(data)
    with running(small(model, tiers)) as group:
        assert one_by_one(group, prompts) == expected
        settled(group)
        assert one_by_one(group, prompts) == expected
        settled(group)
        assert group.engine.stats().blocks_used == 0


def test_a_full_disk_is_bounded(
    model: str, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    limit = 20 * 4 * 2 * 3 * 16 * 16 * 4  # twenty blocks
    tiers = TierConfig(disk_path=str(tmp_path), disk_bytes=limit)
    with running(small(model, tiers)) as group:
        assert one_by_one(group, prompts * 2) == expected * 2
        assert settled(group)["disk"] == 20
    assert len(list(tmp_path.rglob("*.kv"))) <= 21
    with running(small(model, replace(tiers, disk_bytes=limit // 2))) as group:
        opened(group)
        assert one_by_one(group, prompts) == expected
        assert settled(group)["disk"] == 10
    assert len(list(tmp_path.rglob("*.kv"))) <= 11
