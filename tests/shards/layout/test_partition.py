"""Every head, column, row and layer is held by exactly the ranks that should hold it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import SpecError
from arriero.shards.layout.dense import partition, split
from arriero.shards.model_config.dense import ModelConfig


def model(heads: int = 9, kv: int = 3, layers: int = 30, **more) -> ModelConfig:  # noqa: ANN003
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64 * heads,
        "intermediate_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    }
    return ModelConfig.from_dict(settings | more)


def group(**more) -> GroupConfig:  # noqa: ANN003
    return GroupConfig(model_path=str(Path("nowhere")), **more)


def test_smollm2_at_tp2_holds_two_heads_and_one() -> None:
    parts = partition(model(), group(tp=2))
    assert [p.kv_heads.size for p in parts] == [2, 1]
    assert [p.q_heads.size for p in parts] == [6, 3]


def test_shares_are_followed() -> None:
    parts = partition(model(heads=8, kv=8), group(tp=2, tp_shares=(3.0, 1.0)))
    assert [p.kv_heads.size for p in parts] == [6, 2]
    assert [p.columns.size for p in parts] == [1152, 384]


def test_stages_weigh_the_head_as_layers() -> None:
    """SmolLM2's head costs as much as eight layers."""
    assert [p.layers.size for p in partition(model(), group(pp=2))] == [19, 11]


@given(
    kv=st.integers(1, 8),
    ratio=st.integers(1, 8),
    layers=st.integers(1, 20),
    tp=st.integers(1, 12),
    pp=st.integers(1, 6),
)
def test_everything_is_held_once(kv: int, ratio: int, layers: int, tp: int, pp: int) -> None:
    config = model(heads=kv * ratio, kv=kv, layers=layers)
    try:
        parts = partition(config, group(tp=tp, pp=pp))
    except SpecError:
        assert tp > kv or pp > layers
        return
    for stage in range(pp):
        ranks = parts[stage * tp : (stage + 1) * tp]
        for name, total in (("q_heads", kv * ratio), ("columns", 1536), ("vocab", 49152)):
            spans = [getattr(p, name) for p in ranks]
            assert spans[0].start == 0 and spans[-1].stop == total
            assert all(a.stop == b.start for a, b in pairwise(spans))
            assert all(s.size > 0 for s in spans)
        for p in ranks:
            assert p.q_heads.size % p.kv_heads.size == 0
            assert p.q_heads.start // ratio == p.kv_heads.start
            assert (p.q_heads.stop - 1) // ratio == p.kv_heads.stop - 1
    held = [i for p in parts[::tp] for i in range(p.layers.start, p.layers.stop)]
    assert held == list(range(layers))


@given(
    total=st.integers(1, 5000),
    shares=st.lists(st.floats(0.1, 10), min_size=1, max_size=16),
    multiple=st.sampled_from([1, 16, 64]),
)
def test_split(total: int, shares: list[float], multiple: int) -> None:
    try:
        spans = split(total, shares, multiple)
    except ValueError:
        assert -(-total // multiple) < len(shares)
        return
    assert spans[0].start == 0 and spans[-1].stop == total
    assert all(s.size > 0 for s in spans)
    assert all(s.start % multiple == 0 for s in spans)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"tp": 10}, "`tp`=10 must be 1 to 9"),
        ({"pp": 31}, "`pp`=31 must be 1 to 30"),
        ({"layer_split": (10, 10), "pp": 2}, "add up to 30"),
        ({"tp": 2, "tp_shares": (1.0,)}, "2 positive numbers"),
    ],
)
def test_refusals_name_field_value_and_limit(settings, names) -> None:  # noqa: ANN001
    with pytest.raises(SpecError, match=names):
        partition(model(), group(**settings))
