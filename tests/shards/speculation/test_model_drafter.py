"""Drafters by their drafts: a model drafts itself without error, a head follows its equations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kernels.draws import Row, draw
from torch import Tensor

from arriero.kernels.ops import Ops
from arriero.kernels.sampling_rows import Sampled, SamplingRows
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import DraftKind
from support.draft_loop import DraftLoop, Text
from support.eagle3_heads import ReferenceHead, head_settings, head_weights, write_head
from support.models import tiny_llama
from support.slices import exact_ops
from support.taps import outputs_and_taps

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=5)
LAYERS = 8


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return exact_ops(request.param)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "target", layers=LAYERS, max_positions=1024)
    return tmp_path / "target"


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_model_drafts_itself_without_error(
    target: Path, ops: Ops, params: SamplingParams
) -> None:
    """Chunked prompts, blocks at their ends, wrong drafts and rests without drafts included."""
    loop = DraftLoop(target, "draft", target, ops)
    texts = [
        loop.enter(slot, [(7 * i + slot) % 128 for i in range(length)], params)
        for slot, length in enumerate((5, 33, 70))
    ]
    for _ in range(3):
        loop.step([0, 1, 2], 4, chunk=30, ahead=4)
    spoiled = 0
    for step in range(40):
        if step % 5 == 3:
            for text in texts:
                if len(text.drafts) > 1:
                    text.drafts[1] = (text.drafts[1] + 1) % 128
                    spoiled += 1
        if step % 11 == 7:
            for text in texts:
                text.drafts = []
        loop.step([0, 1, 2] if step % 3 else [2, 0], lambda slot: 1 + slot * 2, ahead=8)
    assert spoiled > 10
    for text in texts:
        right = _right(text)
        assert right and all(right), "each draft is what the target draws"


def test_rows_wait_while_nothing_is_drafted(target: Path, ops: Ops) -> None:
    """Drafts are right again after many steps without, at blocks' ends too."""
    loop = DraftLoop(target, "draft", target, ops)
    text = loop.enter(0, list(range(20)), SAMPLED)
    loop.step([0])
    for pause in (3, 15, 16, 40):
        for _ in range(pause):
            loop.step([0])
            text.drafts = []
        loop.step([0], 5, ahead=5)
        loop.step([0], 5, ahead=5)
    assert len(_right(text)) > 20 and all(_right(text))


def test_drafts_are_shorter_without_blocks(target: Path, ops: Ops) -> None:
    """No row is computed at a position without a block."""
    loop = DraftLoop(target, "draft", target, ops)
    text = loop.enter(0, list(range(14)), GREEDY)
    loop.step([0], 8)  # positions 14 and 15 have a block
    assert len(text.drafts) == 2
    loop.enter(0, list(range(16)), GREEDY)
    text = loop.texts[0]
    loop.step([0], 8)
    assert text.drafts == [], "the first token after the prompt has no block"
    loop.step([0], 8)
    assert len(text.drafts) == 8
    loop.step([0])
    assert all(_right(text))


@pytest.mark.parametrize("kind", ["draft", "eagle3"])
def test_the_warm_up_computes_and_draws_in_each_form(
    target: Path, tmp_path: Path, kind: DraftKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of each size, and draws as in steps, of a head by the ids of its vocabulary."""
    head = head_settings(draft_vocab=48)
    write_head(tmp_path / "head", head, head_weights(head))
    ops = exact_ops("reference")
    drawn: list[tuple[bool, int | None]] = []
    sample = ops.sample

    def seen(logits_RV: Tensor, rows: SamplingRows) -> Sampled:
        ids = rows.token_ids_V
        drawn.append((rows.all_greedy, None if ids is None else len(ids)))
        return sample(logits_RV, rows)

    monkeypatch.setattr(ops, "sample", seen)
    drafter = target if kind == "draft" else tmp_path / "head"
    loop = DraftLoop(target, kind, drafter, ops, sequences=1)
    loop.drafter.warm_up([2, 16, 1100], 64, torch.float32)  # 1100 are more than the slot has
    assert set(drawn) == {(greedy, 48 if kind == "eagle3" else None) for greedy in (True, False)}
    if kind == "draft":
        text = loop.enter(0, list(range(9)), SAMPLED)
        for _ in range(4):
            loop.step([0], 4, ahead=4)
        assert text.mean_emitted == 5, "what the warm-up wrote is read by nobody"


def test_a_slot_is_used_again(target: Path, ops: Ops) -> None:
    """A new sequence in a slot takes nothing from the sequence before."""
    loop = DraftLoop(target, "draft", target, ops)
    for seed in range(3):
        text = loop.enter(0, list(range(seed, 40)), SAMPLED)
        for _ in range(5):
            loop.step([0], 4, ahead=4)
        assert text.mean_emitted == 5


def _right(text: Text) -> list[bool]:
    """For each drafted token with a known true token: whether the token is the true one."""
    right = []
    for position, drafts in text.drafted:
        for i, token in enumerate(drafts):
            if (
                position + i < len(text.tokens)
                and text.tokens[position : position + i] == drafts[:i]
            ):
                right.append(token == text.tokens[position + i])
    return right


@pytest.mark.parametrize(
    ("layout", "own_embedding", "params"),
    [
        ("flat", False, GREEDY),
        ("flat", True, GREEDY),
        ("nested", False, GREEDY),
        ("nested", True, GREEDY),
        ("flat", False, SAMPLED),
    ],
)
def test_a_head_follows_its_equations(
    target: Path, tmp_path: Path, ops: Ops, layout: str, own_embedding: bool, params: SamplingParams
) -> None:
    """Drafts equal those of plain torch on the target's true taps, step for step.

    Drawn ones have the noise of the target's tokens, not of the head's rows.
    """
    settings = head_settings(layout=layout)
    weights = head_weights(settings, own_embedding=own_embedding)
    head = write_head(tmp_path / "head", settings, weights)
    loop = DraftLoop(target, "eagle3", head, ops)
    assert loop.drafter.taps == (2, LAYERS // 2, LAYERS - 3)
    texts = [
        loop.enter(slot, [(5 * i + slot) % 128 for i in range(length)], params)
        for slot, length in enumerate((4, 37))
    ]
    for _ in range(2):
        loop.step([0, 1], 3, chunk=20, ahead=3)
    for step in range(30):
        if step % 7 == 2:  # pauses: rows wait, then are computed together
            for _ in range(5):
                loop.step([0, 1])
        loop.step([0, 1] if step % 4 else [1], lambda slot: 3 - slot, ahead=3)
    embedding = weights.get("embed_tokens.weight")
    if embedding is None:
        embedding = TensorFolder.of(target).tensor("model.embed_tokens.weight")
    reference = ReferenceHead(settings, weights, embedding)
    for text in texts:
        _, kept = outputs_and_taps(target, text.tokens, loop.drafter.taps, kernels="reference")
        taps = list(kept)
        checked = 0
        for position, drafts in text.drafted:
            if drafts:
                wanted = _drafts(
                    reference, weights, taps, text.tokens[:position], len(drafts), params
                )
                assert drafts == wanted
                checked += 1
        assert checked > 20


def _drafts(
    reference: ReferenceHead,
    weights: dict[str, Tensor],
    taps: list[Tensor],
    tokens: list[int],
    length: int,
    params: SamplingParams,
) -> list[int]:
    features = reference.fuse([tap[: len(tokens) - 1] for tap in taps])
    targets = torch.arange(len(weights["d2t"])) + weights["d2t"]
    drafts: list[int] = []
    for _ in range(length):
        y = reference(torch.tensor([*tokens[1:], *drafts]), features)[-1:]
        logits = np.full(128, -np.inf, np.float32)
        logits[targets.numpy()] = reference.logits(y).float().numpy().reshape(-1)
        row = Row(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=params.seed or 0,
            position=len(tokens) + len(drafts),
        )
        drafts.append(draw(logits, row))
        features = torch.cat([features, reference.next_feature(y)])
    return drafts
