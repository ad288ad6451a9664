"""A measured cell's arithmetic."""

from __future__ import annotations

import json

import pytest

from arriero.cluster.cli import run
from arriero.cluster.engine_bench import Cell, Clock


def test_prompts_are_the_ones_agreed_on() -> None:
    prompts = Cell(requests=3, prompt=4, output=1).prompts()
    assert prompts[0] == [100, 113, 126, 139]
    assert [one[0] for one in prompts] == [100, 107, 114]


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr("arriero.cluster.engine_bench.time.perf_counter", lambda: next(times))
    clock = Clock(requests=2, output=2)
    clock.start()
    clock.record(0, 1)
    clock.record(1, 1)
    clock.record(0, 1)
    clock.record(1, 1)
    figures = clock.figures()
    assert figures.elapsed_s == 2.5
    assert figures.output_tok_s == pytest.approx(1.6)
    assert figures.ttft_ms["p50"] == 1000
    assert figures.itl_ms["p50"] == 1250


def test_a_missing_token_is_an_error() -> None:
    clock = Clock(requests=1, output=2)
    clock.start()
    clock.record(0, 1)
    with pytest.raises(AssertionError, match="did not give 2 tokens"):
        clock.figures()


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokens", "1,5", "--context", "40", "--seconds", "0.001", "--json"]
    assert run(["bench", "kernels", *flags]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["memory_gb_s"] > 0 and said["matrix_gflop_s"] > 0
    found = {(one["op"], one["tokens"], one["context"]) for one in said["ops"]}
    assert ("linear gate_up", 5, 0) in found
    assert {("paged_attention, decode", 1, 40), ("paged_attention, prefill", 5, 5)} <= found
    for one in said["ops"]:
        assert one["us"] > 0 and one["limit_us"] > 0, one
        assert one["share"] == pytest.approx(one["limit_us"] / one["us"], abs=1e-4), one
    # the limits are arithmetic on the rates, so they hold on a busy machine too: shares do not
    limit = {(one["op"], one["tokens"]): one["limit_us"] for one in said["ops"]}
    assert limit["linear gate_up", 1] <= limit["linear gate_up", 5]
    read_bytes = limit["linear gate_up", 1] * 1e-6 * said["memory_gb_s"] * 1e9
    weights = 2 * 2 * 576 * 1536
    assert read_bytes == pytest.approx(weights, rel=0.02)


def test_kernels_refuses_what_it_cannot_measure(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, why in (
        (["--tokens", "1,x"], "whole numbers from 1 up"),
        (["--dtype", "int3"], "none of float32, bfloat16, float16"),
        (["--model", "llama-4-scout"], "has experts"),
    ):
        assert run(["bench", "kernels", *flags]) == 2
        assert why in capsys.readouterr().err
