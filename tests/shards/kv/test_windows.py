"""Groups with a window keep, bring up and pull what the next token sees: window and sinks."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import TierConfig
from arriero.shards.kv.paging import SeenBlocks
from support.groups import running

from .test_tiers import GREEDY, model, one_by_one, one_by_one_kept, opened, prompts, settled
from .test_tiers import shared as told_of
from .test_tiers import small as plain

__all__ = ["model", "prompts"]  # fixtures

WINDOW, SINKS = 40, 5
SEEN = SeenBlocks(AttentionMaskSpec(window=WINDOW, sinks=SINKS), 16)


def small(model: str, tiers: TierConfig, **more: object) -> GroupConfig:
    window = {"sliding_window": WINDOW, "attention_sinks": SINKS, "changes_answers": True}
    return plain(model, tiers, **window | more)


@pytest.fixture(scope="module")
def expected(model: str, prompts: list[list[int]]) -> list[list[int]]:
    with running(small(model, TierConfig(), prefix_cache=False)) as group:
        return one_by_one(group, prompts)


def test_a_restart_in_another_layout_finds_windows_on_disk(
    model: str, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    tiers = TierConfig(host_bytes=64 << 20, disk_path=str(tmp_path), disk_bytes=64 << 20)
    with running(plain(model, tiers)) as group:  # other keys: none of these is ever found below
        assert one_by_one_kept(group, prompts) != expected
    with running(small(model, tiers)) as group:
        assert one_by_one_kept(group, prompts) == expected
        assert one_by_one(group, prompts) == expected  # from the device, or from host memory
        assert not settled(group)["failed"]
    with running(small(model, tiers, tp=2)) as group:
        opened(group)
        assert one_by_one(group, prompts) == expected
        hits = [(len(one) - 1) // 16 for one in prompts]
        counts, stats = settled(group), group.engine.stats()
        assert stats.cached_tokens == 16 * sum(hits)
        assert counts["loaded"] == sum(len(SEEN.numbers(hit)) for hit in hits) == 4 * len(hits)
        assert not counts["failed"] and not stats.blocks_used


def test_windows_come_from_another_group_s_memory(
    model: str, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    tiers = TierConfig(host_bytes=64 << 20)
    with running(small(model, tiers)) as other, running(small(model, tiers)) as group:
        assert one_by_one_kept(other, prompts) == expected
        for prompt, tokens in zip(prompts, expected, strict=True):
            asked = group.submit(prompt, GREEDY, peer=told_of(other, prompt))
            assert group.wait([asked])[0].tokens == tokens
        assert settled(group)["loaded"] == 4 * len(prompts)
