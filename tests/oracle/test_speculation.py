"""Speculation changes no token: 200 prompts, over layouts, sampling and kinds of drafts.

One slice computes all of SmolLM2, with the trained drafters of `tests/assets/train_drafts.py` where
these exist (`ARRIERO_DRAFTS`, by default `build/drafts`). The other layouts cut its first layers,
which meet the same plans, draws and collectives in two fifths of the time.
`ARRIERO_SPEC_PROMPTS` sets another number of prompts.
"""

from __future__ import annotations

import os
import random
import shutil
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.eagle3_heads import random_head
from support.groups import Group
from support.models import tiny_llama
from support.oracle import first_layers
from support.same_tokens import Expected, compare, grammar_variants, variants, without_drafts
from support.stop_strings import StopStrings

from .conftest import words

NUM_PROMPTS = int(os.environ.get("ARRIERO_SPEC_PROMPTS", "200"))
NEW_TOKENS = 24
ROOT = Path(__file__).parents[2]
MAVERICK = ROOT / "tests" / "assets" / "tiny-maverick"
TRAINED = Path(os.environ.get("ARRIERO_DRAFTS", ROOT / "build" / "drafts"))
TARGET_LAYERS, DRAFT_LAYERS = 8, 4
"""Layers of the target in the layouts with several ranks, and of the draft model without training.
"""
LAYOUTS: dict[str, dict[str, Any]] = {
    "one slice": {},
    "TP2 unequal": {"tp": 2, "tp_shares": (2, 1)},
    "PP2": {"pp": 2},
    "TP3 PP2": {"tp": 3, "pp": 2},
    "Maverick EP2": {"dp": 2},
}
KINDS = {"ngram": (1, 7), "suffix": (2, 7), "sometimes": (2, 7), "draft": (1, 2), "eagle3": (1, 2)}
"""Rounds of each kind, and most drafted tokens of a step. A second round finds warm caches; wrong
drafts of a model cost a row each, since the model is asked for drafts at any cost."""


class Column:
    """The requests of a layout, their answers without drafts, and the layout's drafters."""

    def __init__(self, layout: str, model: Path, drafters: dict[str, str]) -> None:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        texts = [words(seed, 60, tokenizer) for seed in range(20)]
        rng = random.Random(5)
        self.prompts = [
            # prompts that repeat themselves, so that there is something to copy
            (prompt[:24] * rng.randint(1, 3))[: rng.randint(8, 60)]
            for prompt in islice(cycle(texts), NUM_PROMPTS)
        ]
        each = variants(NEW_TOKENS) | grammar_variants(NEW_TOKENS)
        self.params: list[SamplingParams] = list(islice(cycle(each.values()), NUM_PROMPTS))
        chunked = {"num_local_blocks": 900} if model == MAVERICK else {}
        self.config = GroupConfig(
            model_path=str(model),
            dtype="float32",
            num_blocks=900,  # too few for all at once: sequences are pre-empted
            max_model_len=256,
            max_sequences=160,
            max_batch_tokens=256,
            **LAYOUTS[layout],
            **chunked,
        )
        self.drafters = drafters
        self.stops = StopStrings(tokenizer)
        self.expected: Expected = without_drafts(self.config, self.prompts, self.params)


@pytest.fixture(scope="module")
def models(
    whole: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, str]]]:
    """By name: the folder of a target, and the folders of its drafters.

    Without training, a draft model is SmolLM2's first layers, or a small random model for Maverick,
    and a head has random weights.
    """
    folder = tmp_path_factory.mktemp("drafters")
    layers = folder / "layers"
    few = folder / "few"
    first_layers(Path(whole), layers, DRAFT_LAYERS)
    first_layers(Path(whole), few, TARGET_LAYERS)
    shutil.copy(Path(whole) / "tokenizer.json", few)
    tiny_llama(folder / "maverick-layers", vocab=2048)
    made = {
        "whole": (Path(whole), layers, 1024),
        "few": (few, layers, 1024),
        "Maverick": (MAVERICK, folder / "maverick-layers", 256),
    }
    targets = {}
    for name, (target, draft, draft_vocab) in made.items():
        head = random_head(folder / f"{name}-head", target, draft_vocab=draft_vocab)
        targets[name] = target, {"draft": str(draft), "eagle3": str(head)}
    for kind in ("draft", "eagle3"):
        if (TRAINED / kind / "config.json").is_file():
            targets["whole"][1][kind] = str(TRAINED / kind)
    return targets


@pytest.fixture(scope="module", params=LAYOUTS)
def column(
    request: pytest.FixtureRequest, models: dict[str, tuple[Path, dict[str, str]]]
) -> Column:
    """Made once for all kinds."""
    layout: str = request.param
    name = "Maverick" if "Maverick" in layout else "few" if LAYOUTS[layout] else "whole"
    return Column(layout, *models[name])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_200_prompts(column: Column, kind: str) -> None:
    """Tokens, log-probabilities and ends; and text with stop strings over the ends of steps."""

    def check_stops(group: Group) -> None:
        within = [column.stops.check(answer.steps) for answer in group.answers.values()]
        if kind == "sometimes" and NUM_PROMPTS >= 100:
            assert any(within), "no stop string ended within a step"

    rounds, most = KINDS[kind]
    compare(
        column.config,
        column.prompts,
        column.params,
        kind,
        column.expected,
        rounds=rounds,
        most=most,
        drafters=column.drafters,
        inspect=check_stops,
    )
