"""The same tokens where ranks are many: TP3 x PP2, and experts over two ranks with drafters."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from arriero.shards.config.group import GroupConfig
from support.eagle3_heads import random_head
from support.models import tiny_llama
from support.same_tokens import check, variants

from .test_identity import MAVERICK, code_prompts, maverick, prompts_of


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama(folder / "m", seed=3, layers=8, heads=6, kv_heads=3, hidden=96)
    random_head(folder / "eagle3", folder / "m", draft_vocab=48)
    return folder


def test_three_ranks_in_each_of_two_stages(dense: Path) -> None:
    config = GroupConfig(
        model_path=str(dense / "m"),
        dtype="float32",
        num_blocks=256,
        max_sequences=16,
        threads=1,
        tp=3,
        pp=2,
    )
    params = list(variants(16).values())
    drafters = {"eagle3": str(dense / "eagle3")}
    prompts = prompts_of(len(params), 128)
    check(config, prompts, params, ["sometimes", "eagle3"], rounds=1, drafters=drafters)


def test_drafters_of_experts_on_two_ranks(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "draft", vocab=2048)
    random_head(tmp_path / "eagle3", Path(MAVERICK), draft_vocab=256)
    drafters = {kind: str(tmp_path / kind) for kind in ("draft", "eagle3")}
    params = dict(islice(variants(16).items(), 4)) | {"samples": variants(16)["samples"]}
    prompts = code_prompts(len(params))
    config = maverick(dp=2)
    check(config, prompts, list(params.values()), list(drafters), rounds=1, drafters=drafters)
