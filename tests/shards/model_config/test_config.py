"""config.json, against transformers and against what we do not compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.checkpoint.formats.describe import describe, read_settings
from arriero.shards.checkpoint.llama_names import expected_tensors
from arriero.shards.errors import CheckpointError
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.model_config.rope import RopeConfig
from arriero.shards.models.qwen3.config import Qwen3Config

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES = {
    "8B": ({}, 8_030_261_248),
    "70B": (
        {
            "num_hidden_layers": 80,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
        },
        70_553_706_496,
    ),
    "405B": (
        {
            "num_hidden_layers": 126,
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_attention_heads": 128,
        },
        405_853_388_800,
    ),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_counted(size: str) -> None:
    changes, count = SIZES[size]
    assert ModelConfig.from_dict(LLAMA_8B | changes).num_parameters() == count


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)])
def test_parameters_are_those_of_the_expected_tensors(
    tied: bool, biases: tuple[bool, bool]
) -> None:
    config = ModelConfig.from_dict(
        LLAMA_8B
        | {
            "tie_word_embeddings": tied,
            "attention_bias": biases[0],
            "mlp_bias": biases[1],
            "num_hidden_layers": 3,
            "head_dim": 96,
        }
    )
    shapes = expected_tensors(config).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == config.num_parameters()


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 100000, 500000.0])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "default"},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 2},
        LLAMA3,
        LLAMA3 | {"factor": 32.0},
        {"type": "dynamic", "factor": 1.3},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192},
        {
            "type": "yarn",
            "factor": 8,
            "original_max_position_embeddings": 4096,
            "beta_fast": 20.0,
            "beta_slow": 2,
        },
    ],
)
@pytest.mark.parametrize("spelling", ["transformers 4", "transformers 5"])
def test_frequencies_are_those_of_transformers_bit_for_bit(
    head_dim: int, theta: float, scaling: dict[str, Any] | None, spelling: str
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    found = LLAMA_8B | {"head_dim": head_dim}
    if spelling == "transformers 4":
        found |= {"rope_theta": theta, "rope_scaling": scaling}
    else:
        del found["rope_theta"]
        found["rope_parameters"] = {"rope_theta": theta} | (scaling or {"rope_type": "default"})
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(found))))
    due = theirs.inv_freq
    config = ModelConfig.from_dict(found)
    freq = config.inv_freq()
    assert config.rope.attention_factor == theirs.attention_scaling
    assert freq.dtype == torch.float32
    assert freq.shape == (head_dim // 2,)
    assert torch.equal(freq, due)


def test_llama3_keeps_smooths_and_divides() -> None:
    plain = ModelConfig.from_dict(LLAMA_8B).inv_freq()
    scaled = ModelConfig.from_dict(LLAMA_8B | {"rope_scaling": LLAMA3}).inv_freq()
    assert int((scaled == plain).sum()) == 29
    assert int((scaled == plain / 8).sum()) == 29


def test_llama3_with_equal_bounds_divides_by_no_zero() -> None:
    rule = LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0}
    plain = ModelConfig.from_dict(LLAMA_8B).inv_freq()
    scaled = ModelConfig.from_dict(LLAMA_8B | {"rope_scaling": rule}).inv_freq()
    assert int((scaled == plain).sum()) == 35
    assert int((scaled == plain / 16).sum()) == 29


def test_what_transformers_saves_is_read_back(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_parameters={"rope_theta": 7e5} | LLAMA3,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 6], "temperature": 0.6, "top_p": 0.9, "top_k": 20})
    )
    config = ModelConfig.from_folder(tmp_path)
    assert config.rope == RopeConfig(
        theta=7e5, scaling="llama3", factor=8, low=1, high=4, original_max=8192
    )
    assert (config.num_kv_heads, config.head_dim, config.torch_dtype) == (4, 16, "bfloat16")
    assert config.eos_token_ids == (5, 6, 2)  # LlamaConfig's own default is 2


@pytest.mark.parametrize(
    ("generation", "ends"),
    [
        (None, (128001, 128008, 128009)),
        ({}, (128001, 128008, 128009)),
        ({"eos_token_id": None}, (128001, 128008, 128009)),
        # a text ends at either file's: fine-tunes leave the base model's in one of them
        ({"eos_token_id": 7}, (7, 128001, 128008, 128009)),
        ({"eos_token_id": [7, 128009]}, (7, 128009, 128001, 128008)),
        ({"eos_token_id": 7.0}, (7, 128001, 128008, 128009)),
        ({"eos_token_id": "7"}, (7, 128001, 128008, 128009)),
        ({"eos_token_id": -1}, (128001, 128008, 128009)),
    ],
)
def test_end_tokens(generation: dict[str, Any] | None, ends: tuple[int, ...]) -> None:
    assert ModelConfig.from_dict(LLAMA_8B, generation).eos_token_ids == ends


def token(text: str) -> dict[str, Any]:
    return {"content": text, "special": True}


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (2,)),
        ({"tokenizer_config.json": {"eos_token": "<end>"}}, (2, 5)),
        ({"tokenizer_config.json": {"eos_token": token("<end>")}}, (2, 5)),
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, (2, 3)),  # of the vocabulary itself
        ({"tokenizer_config.json": {"eos_token": "<two>"}}, (2,)),
        ({"tokenizer_config.json": {"eos_token": None}}, (2,)),
        ({"tokenizer_config.json": {"eos_token": ""}}, (2,)),
        ({"tokenizer_config.json": {"eos_token": "<nowhere>"}}, (2,)),
        ({"tokenizer_config.json": {"eos_token": "<past>"}}, (2,)),  # it has no row
        ({"special_tokens_map.json": {"eos_token": token("<end>")}}, (2, 5)),
        (
            {
                "tokenizer_config.json": {
                    "eos_token": "<six>",
                    "added_tokens_decoder": {"6": token("<six>")},
                },
                "special_tokens_map.json": {"eos_token": "<end>"},
            },
            (2, 5, 6),
        ),
    ],
)
@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_the_tokenizers_end_token(
    tmp_path: Path, files: dict[str, Any], ends: tuple[int, ...], head: bytes
) -> None:
    settings = LLAMA_8B | {"vocab_size": 9, "bos_token_id": None, "eos_token_id": 2}
    tokenizer = {
        "model": {"vocab": {"a": 0, "</s>": 3}},
        "added_tokens": [
            {"content": "<two>", "id": 2},
            {"content": "<end>", "id": 5},
            {"content": "<past>", "id": 9},
        ],
    }
    for name, data in ({"config.json": settings, "tokenizer.json": tokenizer} | files).items():
        (tmp_path / name).write_bytes(head + json.dumps(data).encode())
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == ends
    assert describe(tmp_path)[0].eos_token_ids == ends


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["QwenForCausalLM"]}, "supported: LlamaForCausalLM"),
        ({"architectures": ["MistralForCausalLM"]}, "`sliding_window` is missing"),
        ({"architectures": []}, "supported: LlamaForCausalLM"),
        ({"architectures": None}, "supported: LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "`hidden_act`='gelu'"),
        ({"sliding_window": 0}, "`sliding_window`=0"),
        ({"layer_types": ["sliding_attention"]}, "`layer_types`"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "`factor`=0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "truncate": False}}, "`truncate`"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}, "rope_theta": 1}, "`rope_theta`"),
        ({"rope_scaling": {"type": "dynamic"}}, "`factor` is missing"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "`rope_type`='proportional'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "`rope_type`='longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "`factor` is missing"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "`high_freq_factor`=0.5"),
        ({"rope_scaling": {"full_attention": {}}}, "flat object"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor`=0.5"),
        ({"num_key_value_heads": 5}, "a divisor of `num_attention_heads`=32"),
        ({"num_attention_heads": 0}, "`num_attention_heads`=0"),
        ({"hidden_size": None}, "`hidden_size` is missing"),
        ({"hidden_size": "big"}, "`hidden_size`='big'"),
        ({"hidden_size": True}, "`hidden_size`=True"),
        ({"vocab_size": 10**30}, "`vocab_size`="),
        ({"head_dim": 63}, "even"),
        ({"head_dim": 2**30}, "`head_dim`=1073741824 must be a whole number from 1 to 65536"),
        ({"num_hidden_layers": 2**30}, "must be a whole number from 1 to 4096"),
        ({"hidden_size": 4097}, "a divisor of `hidden_size`=4097"),
        ({"rms_norm_eps": float("nan")}, "finite"),
        ({"rope_theta": 10**400}, "finite"),
        ({"tie_word_embeddings": "yes"}, "`tie_word_embeddings`"),
        ({"torch_dtype": "int4"}, "`torch_dtype`='int4'"),
        ({"eos_token_id": 999999}, "below `vocab_size`=128256"),
        ({"eos_token_id": ["a"]}, "a token id"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(LLAMA_8B | change, source="somewhere/config.json")
    assert words in str(caught.value)
    assert "somewhere/config.json" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 128256.0, "hidden_size": 4096.0, "bos_token_id": 128000.0},
        {"eos_token_id": [128001.0, 128008, 128009]},
        {"head_dim": None, "rope_scaling": None, "attention_bias": None, "sliding_window": None},
        {"tie_word_embeddings": 0, "attention_bias": 0, "mlp_bias": None},
        {"hidden_act": "swish"},
        {"torch_dtype": "torch.bfloat16"},
        {"torch_dtype": None, "dtype": "bfloat16"},
        {"pretraining_tp": 4, "_name_or_path": "x", "use_cache": True, "anything": [1]},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
        {"architectures": None, "model_type": "llama"},
    ],
)
def test_spellings_that_change_nothing(change: dict[str, Any]) -> None:
    assert ModelConfig.from_dict(LLAMA_8B | change) == ModelConfig.from_dict(LLAMA_8B)


def test_key_value_heads_that_are_not_given_are_the_query_heads() -> None:
    given = {name: value for name, value in LLAMA_8B.items() if name != "num_key_value_heads"}
    assert ModelConfig.from_dict(given).num_kv_heads == 32


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "missing"),
        ({"adapter_config.json": "{}"}, "PEFT adapter"),
        ({"config.json": "[1]"}, "list, not an object"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": '{"a":' * 100_000}, "not valid JSON"),
        ({"config.json": "\xff"}, "not valid JSON"),
    ],
)
def test_folders_without_a_config(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_folder(tmp_path)
    assert words in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted({*LLAMA_8B, "rope_scaling", "head_dim", "rope_parameters"})), JSON)
def test_any_value_gives_a_config_or_one_clear_error(name: str, value: object) -> None:
    try:
        ModelConfig.from_dict(LLAMA_8B | {name: value})
    except CheckpointError:
        pass


QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_window_layers": 36,
    "sliding_window": None,
    "use_sliding_window": False,
}


def test_qwen3_is_read_with_its_own_defaults() -> None:
    model, scheme = read_settings(QWEN3_8B | {"sliding_window": 4096})
    assert isinstance(model, Qwen3Config) and scheme is None
    assert model.sliding_window is None and not model.tie_word_embeddings
    assert (model.q_size, model.kv_size) == (4096, 1024)
    assert model.max_position_embeddings == 32768 and model.rope.theta == 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 64}, "`use_sliding_window`=True .* of 64"),
        ({"head_dim": None}, "`head_dim` is missing, but a Qwen3 config requires"),
        ({"num_key_value_heads": None}, "`num_key_value_heads` is missing"),
        ({"layer_types": ["sliding_attention"] * 36}, "full_attention for all layers"),
        ({"head_dim": 127}, "`head_dim`=127 must be an even number"),
        ({"hidden_act": "gelu"}, "`hidden_act`='gelu'"),
    ],
)
def test_qwen3_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_settings(QWEN3_8B | change)


def test_an_unknown_architecture_is_told_all_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"'GptForCausalLM' is not supported.*Qwen3ForCausal"):
        read_settings(QWEN3_8B | {"architectures": ["GptForCausalLM"]})
