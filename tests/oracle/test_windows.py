"""A window and sinks on a real model: transformers' own tokens, in memory that a window bounds.

One pass of transformers over prompt and answer, under the mask by definition, says of each token
whether it is the greedy one after all before it: greedy decoding itself, in one pass a prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import SpecError
from arriero.shards.kv.paging import SeenBlocks
from arriero.shards.layout.resolve import cache_salt
from support.groups import running

from .test_layouts import assert_same, fp32, greedy

WINDOW, SINKS, NEW = 70, 5, 64
CHOSEN = (13, 19, 25)  # prompts of 64, 129 and 300 tokens


def windowed(model_path: str, sinks: int = SINKS, **more) -> GroupConfig:  # noqa: ANN003
    settings = {"sliding_window": WINDOW, "attention_sinks": sinks, "changes_answers": True}
    return fp32(model_path, **settings | more)


def mask(length: int, sinks: int) -> torch.Tensor:
    """What is added to scores: 0 for keys that a query sees, else the least number."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    seen = (key <= query) & ((query - key < WINDOW) | (key < sinks))
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def check_greedy(logits_TV: torch.Tensor, num_prompt: int, tokens: list[int]) -> None:
    """Each token is the greatest logit of the position before it."""
    assert logits_TV[num_prompt - 1 :].argmax(-1).tolist() == tokens


@pytest.fixture(
    scope="module", params=["few_layers", pytest.param("whole", marks=pytest.mark.slow)]
)
def model_path(request: pytest.FixtureRequest) -> str:
    path: str = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def chosen(prompts: list[list[int]]) -> list[list[int]]:
    return [prompts[i] for i in CHOSEN]


@pytest.fixture(scope="module")
def expected(model_path: str, chosen: list[list[int]]) -> list[list[int]]:
    """One at a time, with a window and sinks; checked against transformers."""
    import transformers

    with running(windowed(model_path, prefix_cache=False)) as group:
        answers = [group.generate([prompt], greedy(NEW))[0] for prompt in chosen]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        for prompt, answer in zip(chosen, answers, strict=True):
            assert answer.error is None and len(answer.tokens) == NEW
            ids = torch.tensor([[*prompt, *answer.tokens[:-1]]])
            got = model(input_ids=ids, attention_mask=mask(ids.shape[1], SINKS), use_cache=False)
            check_greedy(got.logits[0], len(prompt), answer.tokens)
        plain = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].argmax(-1)
        assert plain.tolist() != answer.tokens, "what a window leaves out decides"
    return [answer.tokens for answer in answers]


def test_a_window_without_sinks_is_mistrals(
    model_path: str, chosen: list[list[int]], tmp_path: Path
) -> None:
    """Transformers' own sliding window; and a checkpoint that states it needs no other word."""
    import transformers

    for file in Path(model_path).iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(settings | {"sliding_window": WINDOW}))
    with (
        pytest.raises(SpecError, match=f"config.json says {WINDOW}"),
        running(fp32(str(tmp_path))),
    ):
        pass
    with running(windowed(str(tmp_path), sinks=0, changes_answers=False)) as group:
        answers = group.generate(chosen, greedy(NEW))
    names = ("architectures", "model_type", "_name_or_path", "torch_dtype", "dtype")
    kept = {name: value for name, value in settings.items() if name not in names}
    config = transformers.MistralConfig(**kept | {"sliding_window": WINDOW})
    model = transformers.MistralForCausalLM.from_pretrained(
        model_path, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        for prompt, answer in zip(chosen, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer.tokens[:-1]]])
            check_greedy(
                model(input_ids=ids, use_cache=False).logits[0], len(prompt), answer.tokens
            )


@pytest.mark.parametrize("chunk", [16, 64])
def test_chunks(model_path, chosen, expected, chunk) -> None:  # noqa: ANN001
    config = windowed(model_path, max_batch_tokens=chunk, max_sequences=16)
    with running(config) as group:
        assert_same(group.generate(chosen, greedy(NEW)), expected)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_layouts(model_path, chosen, expected, tp, pp) -> None:  # noqa: ANN001
    with running(windowed(model_path, tp=tp, pp=pp, threads=1), spawn=True) as group:
        assert_same(group.generate(chosen, greedy(NEW)), expected)
        assert group.engine.stats().blocks_used == 0


def test_the_least_pool(model_path, chosen, expected) -> None:  # noqa: ANN001
    """Blocks for one window: every prompt runs, one after the other or computed again."""
    seen = SeenBlocks(AttentionMaskSpec(window=WINDOW, sinks=SINKS), 16)
    config = windowed(model_path, num_blocks=seen.most(1024), max_batch_tokens=32)
    assert config.num_blocks == 1 + 5 + 1
    with running(config) as group:
        assert_same(group.generate(chosen, greedy(NEW)), expected)


def test_preemption(model_path, chosen, expected) -> None:  # noqa: ANN001
    config = windowed(model_path, num_blocks=17, max_batch_tokens=24, prefix_cache=False)
    with running(config) as group:
        assert_same(group.generate(chosen, greedy(NEW)), expected)


def test_prefix_cache_cold_and_warm(model_path, chosen, expected) -> None:  # noqa: ANN001
    with running(windowed(model_path, max_batch_tokens=64)) as group:
        assert_same(group.generate(chosen, greedy(NEW)), expected)
        warm = group.generate(chosen, greedy(NEW))
        assert_same(warm, expected)
        assert [one.num_cached for one in warm] == [(len(one) - 1) // 16 * 16 for one in chosen]


def test_keys_differ_from_those_of_full_attention(model_path) -> None:  # noqa: ANN001
    configs = [fp32(model_path), windowed(model_path), windowed(model_path, sinks=0)]
    assert len({cache_salt(config, "digest") for config in configs}) == 3
