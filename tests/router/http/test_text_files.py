"""A real checkpoint whose text files name its end token in one place alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from arriero.router.text.model_card import ModelCard
from arriero.shards.config.group import GroupConfig
from arriero.shards.engine.types import EngineConfig
from support.fronted import fronted

MODEL = Path(os.environ.get("ARRIERO_TEST_MODEL", ""))
pytestmark = pytest.mark.skipif(
    "ARRIERO_TEST_MODEL" not in os.environ, reason="ARRIERO_TEST_MODEL names no checkpoint folder"
)
ASK: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


def linked(path: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """The checkpoint with other text files, its weights linked."""
    for file in MODEL.iterdir():
        if file.name not in changes and file.name != "generation_config.json":
            (path / file.name).symlink_to(file.resolve())
    for name, fields in changes.items():
        data = json.loads((MODEL / name).read_text()) | fields
        (path / name).write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("own", [0, None], ids=["another's", "none"])
async def test_the_template_alone_shows_the_end(tmp_path: Path, own: int | None) -> None:
    base = {"eos_token": "<|endoftext|>" if own == 0 else None}
    changes = {"config.json": {"eos_token_id": own}, "tokenizer_config.json": base}
    folder = linked(tmp_path, changes)

    def card(limits: EngineConfig) -> ModelCard:
        assert limits.eos_token_ids == (() if own is None else (0,))
        made = ModelCard.from_folder(
            folder, model="m", group="g", layout="", digest="", bos_token_id=1,
            max_model_len=limits.max_model_len, vocab_size=limits.vocab_size,
            eos_token_ids=limits.eos_token_ids, max_sequences=limits.max_sequences,
        )  # fmt: skip
        assert made.turn_ends == (2,)
        return made

    group = GroupConfig(model_path=str(folder), max_model_len=512, dtype="bfloat16")
    async with fronted(group, card) as front:
        for more in ({}, {"guided_regex": r"[A-Za-z ,.']{1,200}"}, {"guided_choice": ["Paris"]}):
            answer = await front.ask.chat.completions.create(
                model="m", messages=ASK, temperature=0, max_tokens=60, extra_body=more
            )
            (choice,) = answer.choices
            assert choice.finish_reason == "stop" and "Paris" in (choice.message.content or "")
        answer = await front.ask.chat.completions.create(
            model="m", messages=ASK, temperature=0, max_tokens=20, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].finish_reason == "length"
