"""`activation_dtype` int8 in a group: the same tokens beside others, keys of its own, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arriero.cluster.planner.model_check import check_sizes
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.errors import SpecError
from arriero.shards.layout.resolve import cache_salt, resolve
from support.groups import running
from support.models import tiny_llama, tiny_llama4

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=0)
PROMPTS = [[*range(3, 40)], [5, 6, 7], [9] * 20, [*range(90, 60, -1)], [11, 12, 13, 14, 15]]


def group_config(path: Path, **fields: Any) -> GroupConfig:  # noqa: ANN401
    settings = {
        "quantization": "int4",
        "activation_dtype": "int8",
        "kernels": "cpu",
        "threads": 1,
        "num_blocks": 32,
    }
    return GroupConfig(model_path=str(path), **(settings | fields))


@pytest.mark.parametrize(
    ("family", "quantization"), [("llama", "int4"), ("llama", "int8"), ("llama4", "int8")]
)
def test_same_tokens_beside_others(tmp_path: Path, family: str, quantization: str) -> None:
    """Alone, all at once, in chunks, and on two threads."""
    (tiny_llama if family == "llama" else tiny_llama4)(tmp_path)
    config = group_config(tmp_path, quantization=quantization, prefix_cache=False)
    with running(config) as group:
        alone = [group.generate([prompt], GREEDY)[0].tokens for prompt in PROMPTS]
        together = [answer.tokens for answer in group.generate(PROMPTS, GREEDY)]
    assert together == alone
    with running(replace(config, threads=2, max_batch_tokens=16)) as group:
        assert [answer.tokens for answer in group.generate(PROMPTS, GREEDY)] == alone


def test_keys_differ(tmp_path: Path) -> None:
    config = group_config(tmp_path)
    exact = replace(config, activation_dtype=None)
    assert cache_salt(config, "digest") != cache_salt(exact, "digest")
    spec = ModelSpec(name="m", path="/m", quantization="int4", activation_dtype="int8")
    assert spec.group_config("cpu").activation_dtype == "int8"


def test_what_cannot_round_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    model = Checkpoint.open(tmp_path).config
    for fields in ({"kernels": "reference"}, {"device": "cuda", "kernels": None}):
        with pytest.raises(SpecError, match="`activation_dtype`=int8 needs `device`=cpu"):
            resolve(group_config(tmp_path, **fields), model)
    with pytest.raises(SpecError, match="needs int8 or int4 weights"):
        resolve(group_config(tmp_path, quantization="fp8"), model)
    plain = ModelSpec(name="m", path=str(tmp_path), activation_dtype="int8")
    with pytest.raises(SpecError, match="needs int8 or int4 weights"):
        check_sizes(plain, tmp_path)
