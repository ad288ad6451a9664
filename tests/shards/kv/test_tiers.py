"""Tokens are the same with and without each tier, across restarts, and across layouts."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from arriero.shards.group import GroupConfig
from arriero.shards.kv.config import TierConfig
from arriero.shards.sampling import SamplingParams
from support.groups import Group, running
from support.models import tiny_llama

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
    deadline = time.monotonic() + 20
    while not group.engine._scheduler._blocks.tiers.enabled:
        assert time.monotonic() < deadline, "the tiers never open"
        group.generate([[1, 2, 3]], replace(GREEDY, max_tokens=1))


def one_by_one(group: Group, prompts: list[list[int]]) -> list[list[int]]:
    return [group.generate([prompt], GREEDY)[0].tokens for prompt in prompts]


def settled(group: Group) -> dict[str, int]:
    """Counts of the tiers, once nothing moves."""
    deadline = time.monotonic() + 20
    while group.engine._scheduler.num_moving:
        assert time.monotonic() < deadline, "moves never end"
        time.sleep(0.01)
    return group.engine.stats().tiers


@pytest.fixture(scope="module")
def expected(model: str, prompts: list[list[int]]) -> list[list[int]]:
    with running(small(model, TierConfig(), num_blocks=256, prefix_cache=False)) as group:
        return one_by_one(group, prompts)


def test_host(model: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    with running(small(model, TierConfig(host_bytes=64 << 20))) as group:
        assert one_by_one(group, prompts) == expected
        settled(group)
        assert one_by_one(group, prompts) == expected
        counts = settled(group)
        assert counts["loaded"] > 20 and not counts["failed"]
        stats = group.engine.stats()
        assert stats.cached_tokens == sum((len(one) - 1) // 16 * 16 for one in prompts)
        assert stats.blocks_used == 0


@pytest.mark.parametrize("host", [0, 64 << 20])
@pytest.mark.parametrize(
    "after", [{}, {"tp": 2}, {"pp": 2}, {"tp": 3}], ids=["tp1", "tp2", "pp2", "tp3"]
)
def test_disk_outlives_the_group(
    model: str,
    prompts: list[list[int]],
    expected: list[list[int]],
    tmp_path: Path,
    after: dict[str, int],
    host: int,
) -> None:
    if host and after.get("tp", 1) != 1:
        pytest.skip("covered by the other cases")
    tiers = TierConfig(host_bytes=host, disk_path=str(tmp_path), disk_bytes=64 << 20)
    before = {"tp": 2} if after.get("tp") == 3 or "pp" in after else {}
    with running(small(model, tiers, **before)) as group:
        assert one_by_one(group, prompts) == expected
        assert settled(group)["disk"] == sum((len(one) + 7) // 16 for one in prompts)
    with running(small(model, tiers, **after)) as group:
        opened(group)
        assert one_by_one(group, prompts) == expected
        counts = settled(group)
        assert not counts["failed"]
        assert group.engine.stats().cached_tokens == sum((len(one) - 1) // 16 * 16 for one in prompts)


def test_shared_store(
    model: str, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    tiers = TierConfig(shared_url=f"file://{tmp_path}/store")
    with running(small(model, tiers)) as group:
        assert one_by_one(group, prompts) == expected
        settled(group)
    with running(small(model, tiers)) as group:
        opened(group)
        assert one_by_one(group, prompts) == expected
        assert settled(group)["loaded"] == sum((len(one) - 1) // 16 for one in prompts)


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
