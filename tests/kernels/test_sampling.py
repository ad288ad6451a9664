"""Draws: token for token against a one-row definition, and the same bits in any company."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from arriero.kernels.ops import Ops
from arriero.kernels.sampling_rows import Sampled, SamplingRows

from .draws import Row, adjusted, batch_of, draw

CLASSES = {
    "greedy": Row(temperature=0),
    "plain": Row(),
    "cold": Row(temperature=0.05),
    "frozen": Row(temperature=1e-30),
    "hot": Row(temperature=50.0),
    "min_p": Row(min_p=0.1),
    "min_p_all": Row(min_p=1.0),
    "top_k": Row(top_k=5),
    "top_k_one": Row(top_k=1),
    "top_k_more_than_vocabulary": Row(top_k=10**9),
    "top_p": Row(top_p=0.8),
    "top_p_tiny": Row(top_p=1e-6),
    "top_p_nearly_all": Row(top_p=0.9999),
    "filters": Row(temperature=1.7, top_k=20, top_p=0.9, min_p=0.01),
    "penalties": Row(
        repetition=1.3, presence=0.4, frequency=0.2, prompt=(1, 2, 3), output=(3, 3, 5, 6)
    ),
    "greedy_penalties": Row(temperature=0, repetition=5.0, frequency=2.0, output=(0, 1, 1, 4)),
    "negative_penalties": Row(presence=-2.0, frequency=-2.0, repetition=0.2, output=(7, 7)),
    "bias": Row(bias={0: 100.0, 4: -100.0, 5: -torch.inf}),
    "banned": Row(temperature=2.0, bias={i: -torch.inf for i in range(0, 60, 2)}),
    "allowed": Row(allowed=(3, 11, 60)),
    "allowed_one": Row(allowed=(61,), bias={61: -100.0}),
    "all_banned": Row(allowed=(2,), bias={2: -torch.inf}),
    "greedy_all_banned": Row(temperature=0, allowed=()),
    "everything": Row(
        temperature=0.7,
        top_k=40,
        top_p=0.95,
        min_p=0.02,
        repetition=1.1,
        presence=0.1,
        frequency=0.1,
        prompt=(9, 8),
        output=(8, 7),
        bias={7: 3.0, 1: -torch.inf},
        allowed=tuple(range(50)),
    ),
}


def logits_of(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def expect(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    return [draw(x, row) for x, row in zip(logits.numpy(), rows, strict=True)]


@pytest.mark.parametrize("vocab", [62, 1000])
@pytest.mark.parametrize("kind", CLASSES)
def test_draw(ops: Ops, kind: str, vocab: int) -> None:
    rows = [
        dataclasses.replace(CLASSES[kind], seed=11 * i + 2**33 * (i % 3), position=i)
        for i in range(40)
    ]
    logits = logits_of(len(rows), vocab)
    got = ops.sample(logits.clone(), batch_of(rows, vocab))
    assert got.tokens_R.dtype == torch.int32
    assert got.tokens_R.tolist() == expect(logits, rows)
    assert got.logprobs_R is None and got.top_tokens_RN is None and got.top_logprobs_RN is None


@pytest.mark.parametrize("vocab", [62, 4099])
def test_draw_in_mixed_company(ops: Ops, vocab: int) -> None:
    """Every class in one batch: fields that one row uses change nothing for another."""
    rows = [
        dataclasses.replace(row, seed=5, position=position)
        for position in range(1 if ops.name == "triton" else 4)  # interpreted, rows are slow
        for row in CLASSES.values()
    ]
    logits = logits_of(len(rows), vocab, seed=1)
    assert ops.sample(logits.clone(), batch_of(rows, vocab)).tokens_R.tolist() == expect(
        logits, rows
    )


def bits(sampled: Sampled) -> list[list[object]]:
    """Each row of each field, floats as their bits."""
    fields = [getattr(sampled, f.name) for f in dataclasses.fields(sampled)]
    return [
        [(t.view(torch.int32) if t.is_floating_point() else t).tolist()[r] for t in fields]
        for r in range(len(sampled.tokens_R))
    ]


def test_rows_do_not_depend_on_their_neighbours(ops: Ops) -> None:
    """Alone, in pairs or all together: the same tokens and the same bits of log-probabilities."""
    vocab = 5003
    rows = [dataclasses.replace(row, seed=9, position=i) for i, row in enumerate(CLASSES.values())]
    logits = logits_of(len(rows), vocab, seed=2)
    whole = bits(ops.sample(logits.clone(), batch_of(rows, vocab, 4)))
    for size in (1, 2, 7):
        # interpreted, a call is slow: there only some of the rows go alone and in pairs
        step = 9 if ops.name == "triton" else size
        for first in range(0, len(rows), step):
            part = rows[first : first + size]
            alone = ops.sample(logits[first : first + size].clone(), batch_of(part, vocab, 4))
            assert bits(alone) == whole[first : first + size]
    backwards = ops.sample(logits.flip(0), batch_of(rows[::-1], vocab, 4))
    assert bits(backwards) == whole[::-1]


def test_ties(ops: Ops) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, -2.0, 5.0, 0.0]]).expand(200, -1)
    greedy = [Row(temperature=0)] * 200
    assert set(ops.sample(logits.clone(), batch_of(greedy, 6)).tokens_R.tolist()) == {1}
    for row in (Row(top_k=1), Row(top_k=2), Row(top_p=0.01), Row(min_p=1.0)):
        rows = [dataclasses.replace(row, position=i) for i in range(200)]
        tokens = ops.sample(logits.clone(), batch_of(rows, 6)).tokens_R
        assert set(tokens.tolist()) == {1, 2, 4}, "tokens equal to the last one kept are kept"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_an_answer_say_so(ops: Ops, temperature: float) -> None:
    """NaN, an infinity, or nothing allowed: -1 for that row, and the others as ever."""
    logits = logits_of(6, 62)
    logits[1] = -torch.inf
    logits[2, 7] = torch.nan
    logits[3, 8] = torch.inf
    logits[4, 9:] = -torch.inf
    rows = [Row(temperature=temperature, position=i, top_p=0.9, top_k=30) for i in range(6)]
    got = ops.sample(logits.clone(), batch_of(rows, 62, 0))
    assert got.tokens_R[1:4].tolist() == [-1, -1, -1]
    keep = [0, 4, 5]
    assert got.tokens_R[keep].tolist() == expect(logits[keep], [rows[i] for i in keep])
    assert got.logprobs_R is not None
    assert (got.logprobs_R[1:4] == -torch.inf).all()
    assert got.logprobs_R[keep].isfinite().all()


def test_never_a_filtered_token(ops: Ops) -> None:
    """A thousand draws of near-empty rows: what the row still holds, and nothing past its end."""
    vocab = 131
    rows = [Row(temperature=3.0, seed=i, position=i, allowed=(vocab - 2,)) for i in range(500)]
    rows += [Row(temperature=3.0, seed=i, position=i, allowed=(0, vocab - 1)) for i in range(500)]
    tokens = ops.sample(logits_of(1000, vocab), batch_of(rows, vocab)).tokens_R
    assert set(tokens[:500].tolist()) == {vocab - 2}
    assert set(tokens[500:].tolist()) == {0, vocab - 1}


@pytest.mark.parametrize("over", ["seed", "position"])
def test_draws_follow_the_distribution(ops: Ops, over: str) -> None:
    """Over seeds, and over the positions of one seed; likely tokens next to unlikely ones."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.9, -30.0, 0.0, 1.0])
    rows = [Row(seed=3, position=4, temperature=1.5)] * 20_000
    rows = [dataclasses.replace(row, **{over: i}) for i, row in enumerate(rows)]
    tokens = ops.sample(logits.repeat(len(rows), 1), batch_of(rows, 7)).tokens_R
    counts = torch.bincount(tokens.long(), minlength=7).double()
    p = (logits.double() / 1.5).softmax(-1)
    deviation = (len(rows) * p * (1 - p)).sqrt() + 1
    assert ((counts - len(rows) * p).abs() < 4.5 * deviation).all()
    likely = p > 1e-6
    chi_square = float(((counts - len(rows) * p)[likely] ** 2 / (len(rows) * p)[likely]).sum())
    assert chi_square < 20.5, "5 degrees of freedom: above in 1 of 1000"


def test_a_draw_does_not_tell_the_next_one(ops: Ops) -> None:
    """Pairs of draws at neighbouring positions of a seed occur as often as independent ones."""
    rows = [Row(seed=8, position=i) for i in range(20_000)]
    tokens = ops.sample(torch.zeros(len(rows), 8), batch_of(rows, 8)).tokens_R.long()
    counts = torch.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64).double()
    mean = (len(rows) - 1) / 64
    # Chi-square with 63 degrees: mean 63, deviation 11.2.
    assert ((counts - mean) ** 2 / mean).sum() < 63 + 4.5 * 11.2


def test_a_part_of_the_vocabulary_has_the_noise_of_its_tokens(ops: Ops) -> None:
    """Columns with ids draw what the whole vocabulary draws with all other tokens banned."""
    vocab, num_ids, num_rows = 3001, 700, 12
    generator = torch.Generator().manual_seed(6)
    ids = torch.randperm(vocab, generator=generator)[:num_ids].sort().values
    kinds = [CLASSES[name] for name in ("greedy", "plain", "hot", "filters", "top_p", "min_p")]
    rows = [
        dataclasses.replace(kinds[i % len(kinds)], seed=i, position=50 + i) for i in range(num_rows)
    ]
    part = logits_of(num_rows, num_ids, seed=5)
    whole = torch.full((num_rows, vocab), -torch.inf).index_copy_(1, ids, part)
    batch = dataclasses.replace(batch_of(rows, num_ids), token_ids_V=ids.int())
    columns = ops.sample(part.clone(), batch).tokens_R.tolist()
    assert columns == [
        draw(x, row, ids.tolist()) for x, row in zip(part.numpy(), rows, strict=True)
    ]
    drawn = ops.sample(whole, batch_of(rows, vocab)).tokens_R
    assert drawn.tolist() == ids[columns].tolist()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_masks_of_any_density(ops: Ops, share: float) -> None:
    """Words with no bit, some bits and all bits; of banned logits not even NaN has an effect."""
    vocab, kinds = 1003, ("greedy", "plain", "hot", "filters", "top_p", "penalties")
    random = np.random.default_rng(8)
    rows = [
        dataclasses.replace(
            CLASSES[kind],
            seed=i,
            position=i,
            allowed=tuple(
                {int(random.integers(vocab)), *np.flatnonzero(random.random(vocab) < share)}
            ),
        )
        for i, kind in enumerate(kinds)
    ]
    logits = logits_of(len(rows), vocab, seed=7)
    ids = list(range(5, 5 + 3 * vocab, 3))
    for token_ids in (None, ids):
        batch = batch_of(rows, vocab)
        if token_ids is not None:
            batch = dataclasses.replace(batch, token_ids_V=torch.tensor(ids, dtype=torch.int32))
        expected = [draw(x, row, token_ids) for x, row in zip(logits.numpy(), rows, strict=True)]
        spoiled = logits.clone()
        for x, row in zip(spoiled, rows, strict=True):
            banned = sorted(set(range(vocab)) - set(row.allowed or ()))
            x[banned[:3]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        assert ops.sample(spoiled, batch).tokens_R.tolist() == expected


def test_like_distributions_share_most_draws(ops: Ops) -> None:
    """A little noise on the logits changes few draws: what drafts need.

    Two races share a draw in at least (1 - d) / (1 + d) of the rows, d the total variation.
    """
    vocab, count = 200, 2000
    p = logits_of(1, vocab, seed=8).expand(count, -1)
    q = p + 0.2 * logits_of(1, vocab, 1.0, seed=9)
    rows = [Row(seed=2, position=i) for i in range(count)]
    same = ops.sample(p.clone(), batch_of(rows, vocab)).tokens_R == (
        ops.sample(q.clone(), batch_of(rows, vocab)).tokens_R
    )
    likelihoods = (x[0].double().softmax(-1) for x in (p, q))
    distance = float(torch.stack(list(likelihoods)).diff(dim=0).abs().sum()) / 2
    least = (1 - distance) / (1 + distance)
    assert 0.02 < distance < 0.3
    assert same.double().mean() > least - 4.5 * (least * (1 - least) / count) ** 0.5


def test_a_real_vocabulary(ops: Ops) -> None:
    """One token dominates, or none: 128,256 weights still sum without overflow."""
    vocab = 128_256
    logits = torch.zeros(4, vocab)
    logits[1] = logits_of(1, vocab)[0]
    logits[2, 77_777] = 60.0
    logits[3] = torch.linspace(-4, 4, vocab)
    rows = [Row(seed=i, position=100 + i, top_p=0.95) for i in range(4)]
    tokens = ops.sample(logits.clone(), batch_of(rows, vocab)).tokens_R.tolist()
    assert tokens == expect(logits, rows)
    assert tokens[2] == 77_777


@pytest.mark.parametrize("num_logprobs", [0, 1, 5, 70])
def test_logprobs_come_from_the_raw_logits(ops: Ops, num_logprobs: int) -> None:
    vocab = 62
    rows = [dataclasses.replace(CLASSES["everything"], position=i) for i in range(9)]
    rows += [dataclasses.replace(CLASSES["greedy_penalties"], position=i) for i in range(9)]
    logits = logits_of(len(rows), vocab, 6.0)
    logits[3, 10:14] = logits[3].max() + 1  # ties: by rising id
    logits[4, 0], logits[4, 1] = 0.0, -0.0
    got = ops.sample(logits.clone(), batch_of(rows, vocab, num_logprobs))
    x = logits.double().numpy()
    exact = x - x.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    tokens = got.tokens_R.numpy()
    assert tokens.tolist() == expect(logits, rows)
    assert got.logprobs_R is not None
    # Rounded once to float32; truncated weights take at most vocab * 2**-44 from the sum.
    allowance = 2.0**-24 * np.abs(exact) + 1e-7
    chosen = (np.arange(len(rows)), tokens)
    assert (np.abs(got.logprobs_R.numpy() - exact[chosen]) <= allowance[chosen]).all()
    if num_logprobs == 0:
        assert got.top_tokens_RN is None and got.top_logprobs_RN is None
        return
    assert got.top_tokens_RN is not None and got.top_logprobs_RN is not None
    assert got.top_tokens_RN.dtype == torch.int32
    order = np.argsort(-x, axis=-1, kind="stable")[:, :num_logprobs]
    assert got.top_tokens_RN.tolist() == order.tolist()
    expected = np.take_along_axis(exact, order, -1)
    limit = np.take_along_axis(allowance, order, -1)
    assert (np.abs(got.top_logprobs_RN.numpy() - expected) <= limit).all()


def test_parameters_are_left_alone(ops: Ops) -> None:
    rows = batch_of([CLASSES["everything"], CLASSES["filters"]], 62, 2)
    before = {
        f.name: value.clone() if isinstance(value := getattr(rows, f.name), torch.Tensor) else None
        for f in dataclasses.fields(SamplingRows)
    }
    ops.sample(logits_of(2, 62), rows)
    for name, value in before.items():
        if value is not None:
            assert torch.equal(getattr(rows, name), value), name


def test_strided_logits(ops: Ops) -> None:
    """Gathered slices of a vocabulary may arrive as views."""
    rows = [dataclasses.replace(row, position=3) for row in CLASSES.values()]
    wide = logits_of(2 * len(rows), 70, seed=4)
    view = wide[::2, 3:65]
    expected = expect(view, rows)
    assert ops.sample(view, batch_of(rows, 62)).tokens_R.tolist() == expected


def test_penalties_match_the_definition_of_hugging_face() -> None:
    """The oracle above is itself held against the arithmetic of the API's documents."""
    x = adjusted(
        np.array([2.0, -2.0, 1.0, 1.0], dtype=np.float32),
        Row(repetition=2.0, frequency=0.5, presence=0.25, prompt=(0, 1), output=(2, 2)),
    )
    assert x.tolist() == [1.0, -4.0, 0.5 - 1.0 - 0.25, 1.0]
