"""The example of docs/synthetic-data.md with distilabel, against three small models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from arriero.router.gateway import GatewayConfig
from support.foreign import INSTALL_S, python_with, run
from support.fronted_groups import ServedModel, fronted_groups
from support.tiny_chat import write_tiny_chat

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "synthetic_data.py"
MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
NAMES = ("writer-a", "writer-b", "judge")
LIMIT_S = 1200
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(INSTALL_S + LIMIT_S + 100),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


async def test_two_models_write_and_a_third_rates(tmp_path: Path) -> None:
    python = python_with("distilabel", "distilabel[openai]>=1.5", "requests")
    models = [
        ServedModel(
            name=name,
            folder=write_tiny_chat(tmp_path / name, Path(MODEL), seed=seed, max_positions=4096),
            group={"max_model_len": 4096},
        )
        for seed, name in enumerate(NAMES)
    ]
    out, cache = tmp_path / "rows.jsonl", f"DISTILABEL_CACHE_DIR={tmp_path / 'cache'}"
    async with fronted_groups(models, GatewayConfig(http_address="127.0.0.1:0")) as front:
        command = ["env", cache, *python, str(EXAMPLE), front.url, "--rows", "4", "--out", str(out)]
        assert await run(command, LIMIT_S) == {"rows": 4, "ratings": 8}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert sorted(row["model_names"]) == ["writer-a", "writer-b"]
        assert all(row["generations"]) and len(row["generations"]) == 2
        assert all(1 <= rating <= 5 for rating in row["ratings"])
    assert len({row["instruction"] for row in rows}) == 4
