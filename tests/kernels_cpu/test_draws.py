"""Draws from rows of many spans: the tokens and log-probabilities of the reference's definition."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arriero.kernels.reference import sampling as reference
from arriero.kernels.sampling_rows import SamplingRows

from .small import VARIANTS, cpu

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the CPU kernels are not built")

VOCAB = 7003
"""Seven spans, the last of them short and no multiple of sixteen."""
GRID = list(
    itertools.product(
        (0.0, 0.05, 0.8, 30.0), (0, 1, 50, 2000), (1.0, 0.95, 0.3), (0.0, 1e-12, 0.05)
    )
)


def rows_of(grid: list[tuple[float, int, float, float]]) -> SamplingRows:
    temperature, top_k, top_p, min_p = zip(*grid, strict=True)
    return SamplingRows(
        temperature_R=torch.tensor(temperature, dtype=torch.float32),
        top_k_R=torch.tensor(top_k, dtype=torch.int32),
        top_p_R=torch.tensor(top_p, dtype=torch.float32),
        min_p_R=torch.tensor(min_p, dtype=torch.float32),
        seed_R=torch.arange(len(grid)) * 2**33 + 5,
        position_R=torch.arange(len(grid)),
    )


def logits_of(rows: int) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_parameters(variant: str, masked: bool) -> None:
    rows, logits_RV = rows_of(GRID), logits_of(len(GRID))
    if masked:
        generator = torch.Generator().manual_seed(4)
        words = (len(GRID), -(-VOCAB // 32))
        random_RW = torch.randint(-(2**31), 2**31, words, generator=generator)
        rows = replace(rows, allowed_RW=random_RW.int())
    expected_R = reference.sample(logits_RV, rows).tokens_R
    assert torch.equal(cpu(2, variant).sample(logits_RV, rows).tokens_R, expected_R)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ties(variant: str) -> None:
    """Logits of few values: many columns share the last place that a filter keeps."""
    logits_RV = (logits_of(len(GRID)) / 3).round() * 3
    rows = rows_of(GRID)
    expected_R = reference.sample(logits_RV, rows).tokens_R
    assert torch.equal(cpu(1, variant).sample(logits_RV, rows).tokens_R, expected_R)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_top", [1, 20, 500, VOCAB])
def test_top_tokens(variant: str, num_top: int) -> None:
    """By falling logit and rising id; of rows with NaN or infinities too."""
    logits_RV = logits_of(6)
    logits_RV[0, ::3] = 20.0
    logits_RV[1, 5:] = -torch.inf
    logits_RV[2, 70:90] = torch.nan
    logits_RV[3, 4000] = torch.inf
    logits_RV[4, 6000:] = torch.tensor([0.0, -0.0]).repeat(VOCAB)[: VOCAB - 6000]
    rows = replace(rows_of([(0.0, 0, 1.0, 0.0)] * 6), num_logprobs=num_top, all_greedy=True)
    sampled = cpu(1, variant).sample(logits_RV, rows)
    assert sampled.top_tokens_RN is not None
    assert torch.equal(sampled.top_tokens_RN.long(), reference.top_tokens(logits_RV, num_top))
    totals_R = reference.log_totals(logits_RV)
    expected = reference.with_logprobs(logits_RV, sampled.tokens_R.long(), num_top, totals_R)
    assert sampled.logprobs_R is not None and expected.logprobs_R is not None
    torch.testing.assert_close(sampled.logprobs_R, expected.logprobs_R, rtol=1e-6, atol=1e-6)


def test_variants_have_the_same_bits() -> None:
    rows = replace(rows_of(GRID), num_logprobs=3)
    logits_RV = logits_of(len(GRID))
    results = [cpu(2, variant).sample(logits_RV, rows) for variant in VARIANTS]
    for other in results[1:]:
        for field in ("tokens_R", "logprobs_R", "top_tokens_RN", "top_logprobs_RN"):
            assert torch.equal(getattr(results[0], field), getattr(other, field)), field
