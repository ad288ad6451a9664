"""Taps: the inputs of layers, of every family, on one stage and carried between stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.shards.layout.dense import Span
from arriero.shards.models.taps import Taps
from support.models import tiny_llama, tiny_llama4, tiny_qwen3
from support.oracle import first_layers
from support.slices import CPU
from support.taps import outputs_and_taps

TOKENS, LAYERS = range(13), 4
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "llama4": tiny_llama4,
}


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pp", [1, 2])
def test_taps_are_the_inputs_of_layers(tmp_path: Path, family: str, pp: int, kernels: str) -> None:
    """Tap k is the output of the model's first k layers; the output is the same without taps."""
    path = tmp_path / family
    FAMILIES[family](path, layers=LAYERS)
    taps = (3, 0, 2, LAYERS)
    out, kept = outputs_and_taps(path, TOKENS, taps, pp=pp, kernels=kernels)
    plain, none = outputs_and_taps(path, TOKENS, (), pp=pp, kernels=kernels)
    assert torch.equal(out, plain) and none == ()
    assert torch.equal(kept[3], out)
    alone = [outputs_and_taps(path, TOKENS, (k,), kernels=kernels)[1][0] for k in taps]
    for a, b in zip(kept, alone, strict=True):
        assert torch.equal(a, b)
    assert not any(torch.equal(a, b) for i, a in enumerate(kept) for b in kept[:i])
    if family == "llama":  # the first three layers alone give the input of the fourth
        short = tmp_path / "short"
        first_layers(path, short, 3)
        assert torch.equal(outputs_and_taps(short, TOKENS, (), kernels=kernels)[0], kept[0])


def test_buffers_keep_their_addresses() -> None:
    """Reserved taps are written in place, so that a captured graph can fill them."""
    taps = Taps((1,), Span(start=0, stop=2), last_stage=True)
    taps.reserve(8, 4, torch.float32, CPU)
    (keep,) = taps.hooks.values()
    keep(torch.ones(5, 4))
    first = taps.kept(5)[0]
    keep(torch.full((3, 4), 2.0))
    assert first.data_ptr() == taps.kept(3)[0].data_ptr()
    assert torch.equal(taps.kept(3)[0], torch.full((3, 4), 2.0))
