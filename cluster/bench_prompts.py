"""Prompts of a measurement from a file.

Knows files and tokenizers; knows nothing of engines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arriero.shards.errors import SpecError


def read_prompts(file: Path, model: Path, requests: int | None) -> list[list[int]]:
    """Token ids of each prompt of a file.

    A `.jsonl` file has an object for each prompt, with "prompt" (a text) or "tokens" (ids); any
    other file is one prompt. With `requests`, prompts repeat from the first until so many.

    Raises:
        SpecError: the file is unreadable, or a prompt is empty.
    """
    try:
        text = file.read_text(encoding="utf-8")
        rows: list[dict[str, Any]] = [{"prompt": text}]
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SpecError(f"`--prompt-file`={str(file)!r} cannot be read: {error}") from None
    prompts = _encoded(rows, model)
    short = [number for number, prompt in enumerate(prompts) if not prompt]
    if not prompts or short:
        raise SpecError(
            f"`--prompt-file`={str(file)!r} has no tokens in prompts {short or 'at all'}; give "
            "each line a `prompt` or `tokens`"
        )
    return prompts if requests is None else [prompts[i % len(prompts)] for i in range(requests)]


def _encoded(rows: Sequence[dict[str, Any]], model: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [
        [int(token) for token in row["tokens"]]
        if "tokens" in row
        else list(tokenizer.encode(str(row.get("prompt", ""))).ids)
        for row in rows
    ]
