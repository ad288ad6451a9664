"""Adapter files: what peft and unsloth write is read; anything else is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.shards.adapters.adapter import WEIGHTS_FILE, Adapter
from arriero.shards.adapters.peft_config import CONFIG_FILE, MAX_RANK, PeftConfig
from arriero.shards.checkpoint.formats.modules import Module
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.errors import CheckpointError
from arriero.shards.families.registry import family_of
from arriero.shards.model_config.dense import ModelConfig
from support.models import tiny_llama, write_safetensors

MODEL = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
)
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def modules() -> list[Module]:
    return list(family_of(MODEL).modules(MODEL, True))


def q_shape() -> tuple[int, int]:
    (module,) = [m for m in modules() if m.name == "model.layers.0.self_attn.q_proj"]
    return module.shape  # type: ignore[return-value]


def write(
    folder: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    **settings: Any,  # noqa: ANN401
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(SETTINGS | settings))
    if tensors is None:
        tensors = pair(PREFIX, SETTINGS["r"])
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    return folder


def pair(prefix: str, rank: int, *, end: str = "weight") -> dict[str, torch.Tensor]:
    outs, ins = q_shape()
    generator = torch.Generator().manual_seed(1)
    return {
        f"{prefix}.lora_A.{end}": torch.randn(rank, ins, generator=generator),
        f"{prefix}.lora_B.{end}": torch.randn(outs, rank, generator=generator),
    }


@pytest.mark.parametrize(
    ("prefix", "end"),
    [
        (PREFIX, "weight"),
        (PREFIX, "default.weight"),
        ("base_model.model.layers.0.self_attn.q_proj", "weight"),
        ("base_model.model.language_model.model.layers.0.self_attn.q_proj", "weight"),
        ("model.layers.0.self_attn.q_proj", "weight"),
    ],
)
def test_every_prefix_names_the_same_module(tmp_path: Path, prefix: str, end: str) -> None:
    adapter = Adapter.open(write(tmp_path, pair(prefix, 4, end=end)), modules())
    assert list(adapter.names) == ["model.layers.0.self_attn.q_proj"]
    assert adapter.rank == 4
    matrices = adapter.matrices("model.layers.0.self_attn.q_proj")
    outs, ins = q_shape()
    assert matrices.a.shape == (4, ins) and matrices.b.shape == (4, outs)
    tensors = pair(prefix, 4, end=end)
    torch.testing.assert_close(matrices.b, tensors[f"{prefix}.lora_B.{end}"].T * 2.0)


def test_ranks_and_scales_follow_the_patterns(tmp_path: Path) -> None:
    write(
        tmp_path,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "k_proj": 16},
        alpha_pattern={"k_proj": 4},
        use_rslora=True,
    )
    config = PeftConfig.read(tmp_path)
    assert config.rank_of("layers.0.self_attn.q_proj") == 2
    assert config.rank_of("layers.1.self_attn.q_proj") == 4
    assert config.rank_of("layers.1.self_attn.k_proj") == 16
    assert config.scale("layers.1.self_attn.k_proj", 16) == 4 / math.sqrt(16)
    assert config.scale("layers.1.self_attn.q_proj", 4) == 8 / math.sqrt(4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("trainable_token_indices", [1, 2]),
        ("r", 0),
        ("r", MAX_RANK + 1),
        ("r", 10_000),
        ("r", "4"),
        ("r", True),
        ("lora_alpha", math.inf),
        ("lora_alpha", None),
        ("rank_pattern", {"(a+)+$": 4}),
        ("rank_pattern", {"k_proj": 10_000}),
        ("rank_pattern", [4]),
        ("target_parameters", "experts"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(
    tmp_path: Path, field: str, value: object
) -> None:
    write(tmp_path, **{field: value})
    with pytest.raises(CheckpointError, match=f"`{field}"):
        Adapter.open(tmp_path, modules())


def test_files_that_are_missing_or_broken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        Adapter.open(tmp_path, modules())
    write(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="pickle"):
        Adapter.open(tmp_path, modules())
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x80\x02 a pickle")
    with pytest.raises(CheckpointError, match="pickle"):
        Adapter.open(tmp_path, modules())


def test_tensors_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    """None or a part of an adapter is an error, never the base model in silence."""
    a, b = pair(PREFIX, 4).values()
    for tensors, words in (
        ({}, "has no tensors"),
        ({f"{PREFIX}.lora_A.weight": a}, "only one of"),
        (pair(PREFIX, 8), "at rank 4 needs"),
        ({f"{PREFIX}.lora_A.weight": a, f"{PREFIX}.lora_B.weight": b[:-1]}, "has shape"),
        (pair(PREFIX, 4) | pair(PREFIX.replace("layers.0", "layers.99"), 4), "change no module"),
        (pair(PREFIX.replace("q_proj", "w_proj"), 4), "change no module"),
        (pair(PREFIX, 4) | {"base_model.model.model.norm.lora_A.weight": a}, "change no module"),
        (pair(PREFIX, 4) | {"base_model.model.lm_head.lora_A.weight": a}, "only one of"),
        (pair("base_model.model.lm_head", 4), "has shape"),
        (pair("vision_model.model.layers.0.self_attn.q_proj", 4), "change no module"),
        (pair(PREFIX, 4) | {f"{PREFIX}.lora_magnitude_vector": b[:, 0]}, "change no module"),
        ({name: t.to(torch.int32) for name, t in pair(PREFIX, 4).items()}, "of dtype"),
    ):
        write(tmp_path, tensors)
        with pytest.raises(CheckpointError, match=words):
            Adapter.open(tmp_path, modules())


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = pair(PREFIX, 4)
    tensors[f"{PREFIX}.lora_A.weight"][1, 2] = math.nan
    adapter = Adapter.open(write(tmp_path, tensors), modules())
    with pytest.raises(CheckpointError, match="not finite"):
        adapter.matrices("model.layers.0.self_attn.q_proj")


def test_changed_weights_have_another_digest(tmp_path: Path) -> None:
    first = Adapter.open(write(tmp_path), modules())
    tensors = pair(PREFIX, 4)
    tensors[f"{PREFIX}.lora_A.weight"][0, 0] += 1
    changed = Adapter.open(write(tmp_path, tensors), modules())
    scaled = Adapter.open(write(tmp_path, lora_alpha=9), modules())
    assert len({first.digest, changed.digest, scaled.digest}) == 3


def embedding(rank: int = 4, vocab: int = 128) -> dict[str, torch.Tensor]:
    prefix = "base_model.model.model.embed_tokens"
    return {
        f"{prefix}.lora_embedding_A": torch.randn(rank, vocab),
        f"{prefix}.lora_embedding_B": torch.randn(64, rank),
    }


def tied_model(folder: Path) -> tuple[Path, list[Module]]:
    tiny_llama(folder, vocab=128, tied=True)
    config = Checkpoint.open(folder).config
    return folder, list(family_of(config).modules(config, True))


def test_tables_have_adapters_apart_also_where_they_are_tied(tmp_path: Path) -> None:
    """As peft writes them: with the base's tables, and A of an embedding first."""
    model, known = tied_model(tmp_path / "model")
    table = Checkpoint.open(model).tensor("model.embed_tokens.weight")
    head = "base_model.model.lm_head"
    tensors = embedding(rank=6) | {
        "base_model.model.model.embed_tokens.base_layer.weight": table.clone(),
        f"{head}.base_layer.weight": table.to(torch.bfloat16),
        f"{head}.lora_A.weight": torch.randn(4, 64),
        f"{head}.lora_B.weight": torch.randn(128, 4),
    }
    write(tmp_path / "a", tensors, rank_pattern={"model.embed_tokens": 6})
    adapter = Adapter.open(tmp_path / "a", known, str(model))
    assert list(adapter.names) == ["lm_head", "model.embed_tokens"]
    matrices = adapter.matrices("model.embed_tokens")
    b = tensors["base_model.model.model.embed_tokens.lora_embedding_B"]
    assert matrices.a.shape == (6, 128)
    torch.testing.assert_close(matrices.b, b.T * (8 / 6))
    assert adapter.matrices("lm_head").b.shape == (4, 128)


def test_tables_of_another_model_are_refused(tmp_path: Path) -> None:
    model, known = tied_model(tmp_path / "model")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    table = Checkpoint.open(model).tensor("model.embed_tokens.weight").clone()
    write(tmp_path / "a", embedding() | {name: table})
    Adapter.open(tmp_path / "a", known, str(model))
    with pytest.raises(CheckpointError, match="save_embedding_layers=False"):
        Adapter.open(tmp_path / "a", known)
    for other, words in (
        (table + 0.25, "differs from the model's table"),
        (table[1:], "has shape"),
    ):
        write(tmp_path / "a", embedding() | {name: other})
        with pytest.raises(CheckpointError, match=words):
            Adapter.open(tmp_path / "a", known, str(model))
    for wrong in (embedding(vocab=129), embedding(rank=5)):
        write(tmp_path / "a", wrong)
        with pytest.raises(CheckpointError, match="at rank 4 needs"):
            Adapter.open(tmp_path / "a", known, str(model))
    prefix = "base_model.model.model.embed_tokens"
    as_product = {f"{prefix}.lora_A.weight": torch.ones(4, 64)}
    as_product |= {f"{prefix}.lora_B.weight": torch.ones(128, 4)}
    write(tmp_path / "a", as_product)
    with pytest.raises(CheckpointError, match="change no module"):
        Adapter.open(tmp_path / "a", known, str(model))


def test_patterns_match_the_whole_name_of_a_module_too(tmp_path: Path) -> None:
    whole = "model.layers.0.self_attn.q_proj"
    write(tmp_path, pair(PREFIX, 2), rank_pattern={whole: 2}, alpha_pattern={f"^{whole}": 5})
    adapter = Adapter.open(tmp_path, modules())
    b = pair(PREFIX, 2)[f"{PREFIX}.lora_B.weight"]
    torch.testing.assert_close(adapter.matrices(whole).b, b.T * 2.5)
