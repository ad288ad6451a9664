"""The same tokens with and without drafts of a model on the slices, over layouts and families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import DraftKind, SpeculationConfig
from arriero.shards.engine.speculation.draft_length import StepCost
from support.eagle3_heads import head_settings, head_weights, write_head
from support.groups import Answer, Group, running
from support.models import tiny_llama

MAVERICK = Path(__file__).parents[2] / "assets" / "tiny-maverick"
MOST = 20
LAYERS = 8


def _params() -> list[SamplingParams]:
    greedy: dict[str, Any] = {"temperature": 0.0, "seed": 0, "max_tokens": MOST}
    sampled: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": MOST}
    return [
        SamplingParams(**greedy, ignore_eos=True),
        SamplingParams(**sampled, ignore_eos=True),
        SamplingParams(**sampled, top_p=0.8, top_k=30, min_p=0.02, ignore_eos=True),
        SamplingParams(**greedy, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(**sampled, presence_penalty=0.5, logit_bias={5: 3.0}, ignore_eos=True),
        SamplingParams(**sampled, logprobs=2, ignore_eos=True),
    ]


@pytest.fixture(autouse=True)
def _free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models as small as these save no time with drafts, and the engine would not ask for any."""
    monkeypatch.setattr(StepCost, "share", lambda *args: 0.0)


@dataclass(frozen=True)
class Model:
    """A target with its drafters."""

    target: Path
    vocab: int
    drafters: dict[str, tuple[DraftKind, Path]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama(folder / "target", seed=3, layers=LAYERS)
    tiny_llama(folder / "small", seed=4, layers=1, hidden=32, intermediate=48, head_dim=8)
    drafters: dict[str, tuple[DraftKind, Path]] = {
        "itself": ("draft", folder / "target"),
        "small": ("draft", folder / "small"),
    }
    for layout in ("flat", "nested"):
        settings = head_settings(layout=layout)
        path = write_head(folder / layout, settings, head_weights(settings))
        drafters[layout] = ("eagle3", path)
    return Model(folder / "target", 128, drafters)


@pytest.fixture(scope="module")
def maverick(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("maverick")
    tiny_llama(folder / "small", seed=4, layers=1, hidden=32, head_dim=8, vocab=2048)
    settings = head_settings(vocab=2048, draft_vocab=2048, hidden=128, taps=[1, 3, 4])
    path = write_head(folder / "head", settings, head_weights(settings))
    return Model(MAVERICK, 2048, {"small": ("draft", folder / "small"), "flat": ("eagle3", path)})


def _config(model: Model, **layout: Any) -> GroupConfig:  # noqa: ANN401
    return GroupConfig(
        model_path=str(model.target),
        dtype="float32",
        num_blocks=160,
        max_model_len=256,
        max_sequences=8,
        max_batch_tokens=48,
        threads=1,
        **layout,
    )


def _answers(group: Group, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    return group.generate(prompts, _params())


def _check(config: GroupConfig, model: Model, names: Sequence[str], *, rounds: int = 2) -> None:
    """Compare each drafter with none; the second round finds a warm prefix cache."""
    prompts = [
        [(3 + 7 * i + 11 * j) % model.vocab for j in range(5 + 17 * i)]
        for i in range(len(_params()))
    ]
    with running(config) as group:
        expected = [(each.tokens, each.logprobs) for each in _answers(group, prompts)]
    assert all(len(tokens) == MOST for tokens, _ in expected)
    for name in names:
        kind, path = model.drafters[name]
        speculation = SpeculationConfig(kind=kind, model_path=str(path), max_tokens=4)
        with running(replace(config, speculation=speculation)) as group:
            for _ in range(rounds):
                found = [(each.tokens, each.logprobs) for each in _answers(group, prompts)]
                assert found == expected, name
            counts = group.engine.stats().speculation
        assert counts.drafted > 0, f"{name} drafted nothing"
        if name == "itself":  # penalties alone make it wrong
            assert counts.accepted > 0.6 * counts.drafted


LAYOUTS: dict[str, dict[str, Any]] = {
    "one slice": {},
    "TP2 unequal": {"tp": 2, "tp_shares": (3, 1)},
    "PP2": {"pp": 2},
    "TP2 x PP2": {"tp": 2, "pp": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_model(dense: Model, layout: str) -> None:
    """Each drafter on one slice; one of each kind on several."""
    names = list(dense.drafters) if layout == "one slice" else ["itself", "flat"]
    _check(_config(dense, **LAYOUTS[layout]), dense, names)


@pytest.mark.parametrize("layout", [{}, {"dp": 2}], ids=["one slice", "EP2"])
def test_experts(maverick: Model, layout: dict[str, Any]) -> None:
    """A head of the whole vocabulary with explicit taps, and a dense draft model."""
    config = replace(_config(maverick, **layout), num_local_blocks=128)
    _check(config, maverick, list(maverick.drafters))


def test_pre_emption(dense: Model) -> None:
    """Sequences that leave and enter slots again, with few blocks."""
    config = replace(_config(dense), num_blocks=20, block_size=8, max_model_len=136)
    _check(config, dense, ["itself", "flat"], rounds=1)
