"""Folders as tools leave them: what is read, what is let be, and verifying agrees with loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.checkpoint.verify import verify
from arriero.shards.errors import CheckpointError
from support.models import tiny_llama, tiny_llama4, tiny_weights, write_safetensors, write_sharded
from support.quantized_models import quantized_llama
from support.slices import logits_of

TOKENS = [3, 99, 14, 15, 92, 65, 35]
UP = "model.layers.0.mlp.up_proj"
Weights = dict[str, Tensor]


def rewritten(path: Path, change: Callable[[Weights], object]) -> None:
    folder = TensorFolder.of(path)
    weights = {name: folder.tensor(name).clone() for name in folder.names}
    change(weights)
    write_safetensors(path / "model.safetensors", weights)


def settings(path: Path, **changes: Any) -> None:  # noqa: ANN401
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ----- what changes no answer -------------------------------------------------------------------

HARMLESS: dict[str, Callable[[Weights], object]] = {
    "rotary tables": lambda w: w.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    ),
    "scales of a KV cache": lambda w: w.update(
        {f"model.layers.1.self_attn.{one}_scale": torch.tensor(0.5) for one in "kv"}
    ),
    "a mask": lambda w: w.update(
        {
            "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
            "model.layers.0.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        }
    ),
    "an optimizer": lambda w: w.update({"optimizer.state.0.exp_avg": torch.ones(3)}),
    "a vision tower": lambda w: w.update(
        {
            "vision_tower.layers.0.mlp.weight": torch.ones(3, 3),
            "model.vision.embed": torch.ones(2),
            "value_head.weight": torch.ones(1, 64),
        }
    ),
    "biases of zeros": lambda w: w.update(
        {
            f"{name.removesuffix('.weight')}.bias": torch.zeros(len(one))
            for name, one in list(w.items())
            if "_proj" in name
        }
    ),
    "a longer vocabulary": lambda w: w.update(
        {
            name: torch.cat([w[name], torch.full((32, 64), 9.0)])
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
    ),
    "no `model.`": lambda w: _renamed(w, lambda name: name.removeprefix("model.")),
    "language_model.": lambda w: _renamed(w, lambda name: f"language_model.{name}"),
    "module._orig_mod.": lambda w: _renamed(w, lambda name: f"module._orig_mod.{name}"),
    "model.language_model.": lambda w: _renamed(
        w, lambda name: name.replace("model.", "model.language_model.", 1)
    ),
}


def _renamed(weights: Weights, rename: Callable[[str], str]) -> None:
    renamed = {rename(name): one for name, one in weights.items()}
    weights.clear()
    weights.update(renamed)


@pytest.mark.parametrize("name", HARMLESS)
def test_answers_are_those_of_the_plain_folder(tmp_path: Path, name: str) -> None:
    tiny_llama(tmp_path / "a")
    tiny_llama(tmp_path / "b")
    rewritten(tmp_path / "b", HARMLESS[name])
    report = verify(tmp_path / "b", deep=True)
    assert report.ok, report.problems
    for tp in (1, 2):
        want, got = (logits_of(tmp_path / one, TOKENS, tp=tp) for one in "ab")
        assert torch.equal(got, want)


def test_what_is_not_read_is_told(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    assert verify(tmp_path).notes == ()
    rewritten(tmp_path, HARMLESS["a vision tower"])
    assert verify(tmp_path).notes == ("not read: model.vision.embed and 2 more",)


def test_a_quantized_folder_of_old_with_biases_of_zeros(tmp_path: Path) -> None:
    """AutoGPTQ gave every product a bias."""
    quantized_llama(tmp_path / "a", "gptq")
    quantized_llama(tmp_path / "b", "gptq")

    def add(weights: Weights) -> None:
        for name in [one for one in weights if one.endswith(".qweight")]:
            bias = torch.zeros(weights[name].shape[1], dtype=torch.float16)
            weights[f"{name.removesuffix('.qweight')}.bias"] = bias

    rewritten(tmp_path / "b", add)
    assert verify(tmp_path / "b").ok
    want, got = (logits_of(tmp_path / one, TOKENS, tp=2) for one in "ab")
    assert torch.equal(got, want)


def test_act_order_whose_groups_are_in_order(tmp_path: Path) -> None:
    """`desc_act` may be true of an index that says nothing, and false of one that does."""
    quantized_llama(tmp_path / "a", "gptq")
    quantized_llama(tmp_path / "b", "gptq")
    file = tmp_path / "b" / "config.json"
    found = json.loads(file.read_text())
    found["quantization_config"]["desc_act"] = True
    file.write_text(json.dumps(found))
    assert torch.equal(logits_of(tmp_path / "a", TOKENS), logits_of(tmp_path / "b", TOKENS))
    quantized_llama(tmp_path / "c", "gptq-act-order")
    want = logits_of(tmp_path / "c", TOKENS, tp=2)
    file = tmp_path / "c" / "config.json"
    found = json.loads(file.read_text())
    found["quantization_config"]["desc_act"] = False
    file.write_text(json.dumps(found))
    assert verify(tmp_path / "c").ok
    assert torch.equal(logits_of(tmp_path / "c", TOKENS, tp=2), want)


@pytest.mark.parametrize("order", [None, False, "static", "weight"])
def test_columns_that_were_sorted_and_put_back(tmp_path: Path, order: object) -> None:
    quantized_llama(tmp_path, "packed-4", layers=1)
    want = logits_of(tmp_path, TOKENS, tp=2)
    file = tmp_path / "config.json"
    found = json.loads(file.read_text())
    found["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = order
    file.write_text(json.dumps(found))
    assert verify(tmp_path).ok
    assert torch.equal(logits_of(tmp_path, TOKENS, tp=2), want)


def test_shards_without_an_index(tmp_path: Path) -> None:
    config = tiny_llama(tmp_path)
    want = logits_of(tmp_path, TOKENS)
    (tmp_path / "model.safetensors").unlink()
    write_sharded(tmp_path, tiny_weights(config, 0), 3)
    (tmp_path / "model.safetensors.index.json").unlink()
    write_safetensors(tmp_path / "consolidated.safetensors", {"tok_embeddings": torch.ones(1)})
    assert verify(tmp_path).ok
    assert torch.equal(logits_of(tmp_path, TOKENS), want)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    (problem,) = verify(tmp_path).problems
    assert "missing: model-00002-of-00003.safetensors" in problem and "models pull" in problem


@pytest.mark.parametrize("sees", [False, True])
def test_llama_4_in_the_names_of_transformers_5(tmp_path: Path, sees: bool) -> None:
    tiny_llama4(tmp_path, sees=sees, layers=2)
    want = Checkpoint.open(tmp_path)

    def rename(name: str) -> str:
        if not sees:
            return f"language_model.{name}"
        if name.startswith("language_model.model."):
            return name.replace("language_model.model.", "model.language_model.")
        return f"model.{name}" if "lm_head" not in name else "lm_head.weight"

    held = {name: want.tensor(name).clone() for name in want.names}
    rewritten(tmp_path, lambda w: _renamed(w, rename))
    found = Checkpoint.open(tmp_path)
    found.check_whole()
    assert all(torch.equal(found.tensor(name), one) for name, one in held.items())


def test_a_text_model_of_a_class_that_sees(tmp_path: Path) -> None:
    config = tiny_llama4(tmp_path, layers=2)
    text = json.loads((tmp_path / "config.json").read_text())
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    rewritten(tmp_path, lambda w: _renamed(w, lambda name: f"language_model.{name}"))
    assert verify(tmp_path).ok
    found = Checkpoint.open(tmp_path).config
    assert (found.num_layers, found.hidden_size) == (config.num_layers, config.hidden_size)


# ----- what would ------------------------------------------------------------------------------


def to(name: str, **changes: Any) -> Callable[[Path], object]:  # noqa: ANN401
    """A quantized folder with changes to its `quantization_config`."""

    def change(path: Path) -> None:
        quantized_llama(path, name)
        found = json.loads((path / "config.json").read_text())
        found["quantization_config"] |= changes
        (path / "config.json").write_text(json.dumps(found))

    return change


def plain(change: Callable[[Weights], object], **more: Any) -> Callable[[Path], object]:  # noqa: ANN401
    def made(path: Path) -> None:
        tiny_llama(path, **more)
        rewritten(path, change)

    return made


def quantized(form: str, change: Callable[[Weights], object]) -> Callable[[Path], object]:
    def made(path: Path) -> None:
        quantized_llama(path, form)
        rewritten(path, change)

    return made


def half_of_a_stack(path: Path) -> None:
    """One of two matrices that make one product is plain, and the config says so."""
    quantized_llama(path, "packed-4")
    rewritten(
        path,
        lambda w: [
            w.update({f"{UP}.weight": torch.zeros(96, 64)}),
            *(w.pop(f"{UP}.weight_{one}") for one in ("packed", "scale", "shape")),
        ],
    )
    found = json.loads((path / "config.json").read_text())
    found["quantization_config"]["ignore"] += [UP]
    (path / "config.json").write_text(json.dumps(found))


def rounded_head(path: Path) -> None:
    quantized_llama(path, "compressed-fp8")
    rewritten(
        path,
        lambda w: w.update(
            {
                "lm_head.weight": torch.zeros(128, 64).to(torch.float8_e4m3fn),
                "lm_head.weight_scale": torch.ones(128, 1),
            }
        ),
    )
    found = json.loads((path / "config.json").read_text())
    found["quantization_config"]["ignore"] = []
    (path / "config.json").write_text(json.dumps(found))


def changed_settings(**changes: Any) -> Callable[[Path], object]:  # noqa: ANN401
    def made(path: Path) -> None:
        tiny_llama(path)
        settings(path, **changes)

    return made


def set_one(name: str, value: float) -> Callable[[Weights], object]:
    def change(weights: Weights) -> None:
        weights[name].view(-1)[1] = value

    return change


def shuffled(name: str) -> Callable[[Weights], object]:
    def change(weights: Weights) -> None:
        weights[name] = weights[name].flip(0)

    return change


MUTATED: dict[str, tuple[Callable[[Path], object], str]] = {
    "plain": (lambda path: tiny_llama(path), ""),
    "tied": (lambda path: tiny_llama(path, tied=True), ""),
    "packed-4-group": (to("packed-4-group"), ""),
    "fp8-tensor-inv": (to("fp8-tensor-inv"), ""),
    "fp8-channel": (to("fp8-channel"), ""),
    "a tensor missing": (plain(lambda w: w.pop(f"{UP}.weight")), "up_proj.weight' of shape"),
    "a head missing": (plain(lambda w: w.pop("lm_head.weight")), "`tie_word_embeddings` to true"),
    "a layer too many": (changed_settings(num_hidden_layers=1), "layers.1"),
    "a layer too few": (changed_settings(num_hidden_layers=3), "layers.2"),
    "another width": (changed_settings(intermediate_size=98), "requires"),
    "a larger vocabulary": (changed_settings(vocab_size=160), "set `vocab_size` to 128"),
    "a bias": (plain(lambda w: w.update({f"{UP}.bias": torch.ones(96)})), "`mlp_bias`"),
    "a norm's bias": (plain(lambda w: w.update({"model.norm.bias": torch.ones(64)})), "not zero"),
    "a head's bias": (plain(lambda w: w.update({"lm_head.bias": torch.ones(128)})), "not zero"),
    "norms of heads": (
        plain(lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})),
        "no part",
    ),
    "an adapter's matrix": (
        plain(lambda w: w.update({f"{UP}.lora_A.weight": torch.ones(2, 64)})),
        "no part",
    ),
    "another head beside a tied one": (
        plain(lambda w: w.update({"lm_head.weight": torch.ones(128, 64)}), tied=True),
        "differs from the embedding",
    ),
    "another dtype": (
        plain(lambda w: w.update({f"{UP}.weight": torch.ones(96, 64, dtype=torch.int16)})),
        "int16",
    ),
    "a window for some": (changed_settings(layer_types=["sliding_attention"] * 2), "layer_types"),
    "half of a stack": (half_of_a_stack, "quantize all of them or none"),
    "a rounded head": (rounded_head, "a quantized head with rounded"),
    "a scale that is not finite": (
        quantized("awq", set_one(f"{UP}.scales", float("nan"))),
        "infinite or not a number",
    ),
    "a scale of a matrix not finite": (
        quantized(
            "compressed-fp8-tensor",
            lambda w: w.update({f"{UP}.weight_scale": torch.tensor([float("inf")])}),
        ),
        "infinite or not a number",
    ),
    "groups beyond the scales": (
        quantized("gptq-act-order", set_one(f"{UP}.g_idx", 99)),
        "beyond its scales",
    ),
    "groups beyond the scales, packed": (
        quantized("packed-4-group", set_one(f"{UP}.weight_g_idx", 99)),
        "beyond its scales",
    ),
    "two orders in one product": (
        quantized("gptq-act-order", shuffled(f"{UP}.g_idx")),
        "sort or round inputs differently",
    ),
    "an index that is not followed": (
        quantized(
            "packed-4",
            lambda w: w.update(
                {f"{UP}.weight_g_idx": (torch.arange(64) // 32).flip(0).to(torch.int32)}
            ),
        ),
        "no part",
    ),
    "another stated shape": (
        quantized("packed-4", set_one(f"{UP}.weight_shape", 63)),
        "weight_shape' says [96, 63]",
    ),
    "an index missing": (
        quantized("gptq-act-order", lambda w: w.pop(f"{UP}.g_idx")),
        "g_idx' of shape [64] is missing",
    ),
    "another width of groups": (to("gptq", group_size=16), "requires"),
    "static activations": (
        to("fp8-tensor", activation_scheme="static"),
        "q_proj.input_scale' of shape [1] is missing",
    ),
    "blocks": (to("fp8-tensor", weight_block_size=[16, 16]), "weight_block_size"),
    "odd groups": (to("gptq", group_size=3), "not a multiple of 3"),
}


@pytest.mark.parametrize("name", MUTATED)
def test_verifying_agrees_with_loading(tmp_path: Path, name: str) -> None:
    make, words = MUTATED[name]
    make(tmp_path)
    report = verify(tmp_path)
    try:
        logits_of(tmp_path, TOKENS)
        loads = ""
    except CheckpointError as error:
        loads = str(error)
    assert report.ok is (not loads), (report.problems, loads)
    assert report.ok is (not words), report.problems
    if words:
        assert words in "; ".join(report.problems)
        assert words in loads
