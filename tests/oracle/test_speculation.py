"""Speculation changes no token: 200 prompts, over layouts, sampling and kinds of drafts."""

from __future__ import annotations

import random
from itertools import cycle, islice
from typing import Any

import pytest

from arriero.shards.config.group import GroupConfig
from support.same_tokens import check, variants

LAYOUTS: dict[str, dict[str, Any]] = {
    "one slice": {},
    "TP2 unequal": {"tp": 2, "tp_shares": (2, 1)},
    "PP2": {"pp": 2},
    "TP3 PP2": {"tp": 3, "pp": 2},
}
NUM_PROMPTS, NEW_TOKENS = 200, 32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", "suffix", "sometimes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_200_prompts(
    model_path: str,
    prompts: list[list[int]],
    layout: str,
    kind: str,
) -> None:
    """Prompts that repeat themselves, so that there is something to copy; caches cold and warm."""
    rng = random.Random(5)
    chosen = [
        (prompt[:24] * rng.randint(1, 3))[: rng.randint(8, 60)]
        for prompt in islice(cycle(prompts), NUM_PROMPTS)
    ]
    params = list(islice(cycle(variants(NEW_TOKENS).values()), NUM_PROMPTS))
    config = GroupConfig(
        model_path=model_path,
        dtype="float32",
        num_blocks=900,  # too few for all at once: sequences are pre-empted
        max_model_len=256,
        max_sequences=160,
        max_batch_tokens=256,
        **LAYOUTS[layout],
    )
    check(config, chosen, params, [kind])
