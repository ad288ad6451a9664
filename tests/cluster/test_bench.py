"""A measured cell's arithmetic."""

from __future__ import annotations

import pytest

from arriero.cluster.bench import Cell, Clock


def test_prompts_are_the_ones_agreed_on() -> None:
    prompts = Cell(requests=3, prompt=4, output=1).prompts()
    assert prompts[0] == [100, 113, 126, 139]
    assert [one[0] for one in prompts] == [100, 107, 114]


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr("arriero.cluster.bench.time.perf_counter", lambda: next(times))
    clock = Clock(requests=2, output=2)
    clock.begin()
    clock.took(0, 1)
    clock.took(1, 1)
    clock.took(0, 1)
    clock.took(1, 1)
    figures = clock.figures()
    assert figures.elapsed_s == 2.5
    assert figures.output_tok_s == pytest.approx(1.6)
    assert figures.ttft_ms["p50"] == 1000
    assert figures.itl_ms["p50"] == 1250


def test_a_missing_token_is_an_error() -> None:
    clock = Clock(requests=1, output=2)
    clock.begin()
    clock.took(0, 1)
    with pytest.raises(AssertionError, match="did not give 2 tokens"):
        clock.figures()
