"""What sampling parameters may be: whatever passes leaves something to draw."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.errors import InvalidRequest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.5e-47),  # 0 as a float32, which logits are divided by
        ("repetition_penalty", 101.0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -math.inf),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    changed: dict[str, Any] = {field: value}
    params = replace(SamplingParams(), **changed)
    with pytest.raises(InvalidRequest, match=f"`{field}`") as refused:
        params.check(vocab_size=100)
    assert refused.value.field == field
