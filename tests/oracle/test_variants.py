"""Configurations of the dense families, as tiny seeded models: transformers' own tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.groups import running
from support.models import tiny_llama, tiny_qwen3
from support.oracle import greedy

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "multi-head": {"heads": 4, "kv_heads": 4},
    "multi-query": {"heads": 6, "kv_heads": 1, "hidden": 96},
    "odd heads": {"heads": 7, "kv_heads": 7, "hidden": 112, "head_dim": 16},
    "head_dim given": {"heads": 4, "kv_heads": 2, "head_dim": 80},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "yarn rope": {"rope_scaling": YARN, "max_positions": 256},
    "yarn rope, all numbers": {
        "rope_scaling": YARN
        | {"type": "yarn", "beta_fast": 16, "beta_slow": 2, "mscale": 1.2, "mscale_all_dim": 0.8},
        "max_positions": 256,
    },
    "dynamic rope": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "sharded files": {"sharded": True},
    "odd sizes": {"hidden": 60, "heads": 3, "kv_heads": 3, "intermediate": 97, "vocab": 131},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama of 2023": {
        "architectures": ["LLaMAForCausalLM"],
        "hidden_act": "swish",
        "pretraining_tp": 2,
        "torch_dtype": "torch.float32",
        "num_hidden_layers": 3.0,
        "rope_scaling": None,
        "_name_or_path": "somewhere",
    },
    "transformers 5": {
        "dtype": "float32",
        "torch_dtype": None,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"},
    },
    "Mistral without a window": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
    },
    "Mistral with its window": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 24,
    },
}
LAYOUTS = {
    "yarn rope": (2, 1),
    "multi-head": (3, 2),
    "multi-query": (4, 1),
    "biases": (2, 2),
    "tied": (2, 1),
}


QWEN3: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "odd heads": {"heads": 7, "kv_heads": 7, "head_dim": 16},
    "biases": {"attention_bias": True},
    "yarn rope": {"rope_scaling": YARN, "max_positions": 256},
}
QWEN3_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tp": 2},
    "TP2 of 3 KV heads": {"tp": 2, "heads": 6, "kv_heads": 3},
    "TP2 of unequal shares": {"tp": 2, "tp_shares": (2.0, 1.0), "heads": 6, "kv_heads": 3},
    "TP4 of 2 KV heads": {"tp": 4},
    "PP2": {"pp": 2},
    "TP2 PP2, tied": {"tp": 2, "pp": 2, "tied": True},
}


def expected(path: Path, prompts: list[list[int]], drafts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of transformers, one unpadded sequence at a time."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def logits_of(tokens: list[int]) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    with torch.inference_mode():
        pairs = zip(prompts, drafts, strict=True)
        return [greedy(logits_of, prompt, draft)[0] for prompt, draft in pairs]


def check(path: Path, oracle: Path | None = None, **layout: Any) -> None:  # noqa: ANN401
    vocab = 128
    prompts = [
        [(7 * i + 3 * j * j) % vocab for j in range(n)] for i, n in enumerate((1, 5, 17, 90))
    ]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, seed=0)
    config = GroupConfig(
        model_path=str(path),
        dtype="float32",
        num_blocks=64,
        max_batch_tokens=48,
        max_sequences=8,
        threads=1,
        **layout,
    )
    with running(config) as group:
        answers = group.generate(prompts, params)
    tokens = [answer.tokens for answer in answers]
    assert [len(each) for each in tokens] == [24] * len(prompts)
    assert tokens == expected(oracle or path, prompts, tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_slice(name: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path, seed=3, layers=3, **VARIANTS[name])
    check(tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_several_slices(name: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path, seed=3, layers=3, **VARIANTS[name])
    tp, pp = LAYOUTS[name]
    check(tmp_path, tp=tp, pp=pp)


@pytest.mark.parametrize("name", QWEN3)
def test_qwen3_on_one_slice(name: str, tmp_path: Path) -> None:
    tiny_qwen3(tmp_path, seed=3, layers=3, **QWEN3[name])
    check(tmp_path)


@pytest.mark.parametrize("name", QWEN3_LAYOUTS)
def test_qwen3_on_several_slices(name: str, tmp_path: Path) -> None:
    sizes = dict(QWEN3_LAYOUTS[name])
    layout = {field: sizes.pop(field) for field in ("tp", "pp", "tp_shares") if field in sizes}
    tiny_qwen3(tmp_path, seed=3, layers=3, **sizes)
    check(tmp_path, **layout)


@pytest.mark.parametrize("name", CONFIGS)
def test_other_spellings_of_the_same_computation(name: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path, seed=3, layers=3)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text()) | CONFIGS[name]
    if name == "transformers 5":
        del settings["rope_theta"]
    file.write_text(json.dumps(settings))
    config = {"sliding_window": settings.get("sliding_window"), "attention_sinks": 0}
    # transformers spells numbers and names in one way only
    theirs = settings | {"num_hidden_layers": 3, "torch_dtype": "float32"}
    if name == "llama of 2023":
        theirs["architectures"] = ["LlamaForCausalLM"]
    other = tmp_path / "theirs"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(theirs))
    (other / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    check(tmp_path, oracle=other, **{k: v for k, v in config.items() if v})
