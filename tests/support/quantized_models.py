"""Tiny Llama folders in the forms that checkpoints ship in, and what their numbers mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from arriero.kernels.quantize import quantize_fp8
from arriero.shards.checkpoint.llama_names import EMBEDDING, FINAL_NORM, HEAD, layer_tensors
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.models.llama4.config import Llama4Config
from support.modelopt_files import float8, nvfp4
from support.models import tiny_llama, tiny_llama4, tiny_weights, write_safetensors
from support.quantized_files import awq, eight_bits, fp8, gptq, packed

WEIGHT_ONLY = (
    "awq",
    "gptq",
    "gptq-v2",
    "gptq-act-order",
    "packed-4",
    "packed-4-zeros",
    "packed-8",
    "packed-4-group",
    "packed-4-group-zeros",
    "gptq-no-index",
    "compressed-fp8-weights",
    "compressed-fp8-tensor-weights",
    "int8-channel",
    "int8-tensor",
    "modelopt-nvfp4-weights",
)
ROUNDING = (
    "fbgemm_fp8",
    "compressed-fp8",
    "compressed-fp8-tensor",
    "fp8-tensor",
    "fp8-tensor-inv",
    "fp8-channel",
)

STATIC = (
    "modelopt-fp8",
    "modelopt-nvfp4",
    "compressed-fp8-tensor-static",
    "fp8-tensor-static",
    "int8-channel-static",
    "int8-channel-token",
)
"""Forms with rounded activations whose rounding a test writes out: static scales, and W8A8."""

_INPUTS = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}


def quantization_config(form: str, group: int, ignored: list[str]) -> dict[str, Any]:
    """config.json's object, as the tools that make these checkpoints write it."""
    if form.startswith("modelopt"):
        return modelopt_config(form, ignored)
    if form == "fbgemm_fp8":
        return {
            "quant_method": "fbgemm_fp8",
            "activation_scale_ub": 1200.0,
            "modules_to_not_convert": ignored,
        }
    if form.startswith("fp8"):
        return {
            "quant_method": "fp8",
            "activation_scheme": "static" if form.endswith("static") else "dynamic",
            "weight_block_size": None,
            "ignored_layers": ignored,
        }
    if form == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "version": "gemm",
            "zero_point": True,
            "modules_to_not_convert": None,
        }
    if form.startswith("gptq"):
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": group,
            "desc_act": form == "gptq-act-order",
            "sym": False,
            "checkpoint_format": "gptq_v2" if form == "gptq-v2" else "gptq",
        }
    weights: dict[str, Any] = {"dynamic": False, "symmetric": not form.endswith("zeros")}
    inputs: dict[str, Any] | None = None
    if form.startswith("packed"):
        bits = int(form.split("-")[1])
        weights |= {"num_bits": bits, "type": "int"}
        by_group = {"strategy": "group", "group_size": group}
        weights |= by_group if bits == 4 else {"strategy": "channel", "group_size": None}
        weights |= {"actorder": "group"} if "group" in form else {}
    else:
        kind, strategy = "int" if form.startswith("int8") else "float", "channel"
        if "tensor" in form:
            strategy = "tensor"
        weights |= {"num_bits": 8, "type": kind, "strategy": strategy}
        if form in ROUNDING or form.endswith("token"):
            inputs = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True}
        if form.endswith("static"):
            inputs = {"num_bits": 8, "type": kind, "strategy": "tensor", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": {"packed": "pack-quantized", "int8": "int-quantized"}.get(
            form.split("-")[0], "float-quantized"
        ),
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
        "ignore": ignored,
    }


def modelopt_config(form: str, ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of ModelOpt; of FP8 the content of hf_quant_config.json."""
    producer = {"name": "modelopt", "version": "0.33.0"}
    if form == "modelopt-fp8":
        return {
            "producer": producer,
            "quantization": {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": "FP8",
                "exclude_modules": ignored,
            },
        }
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    weight_only = form.endswith("weights")
    group = {"weights": numbers, "targets": ["Linear"]}
    return {
        "config_groups": {
            "group_0": group if weight_only else group | {"input_activations": numbers}
        },
        "ignore": ignored,
        "quant_algo": "W4A16_NVFP4" if weight_only else "NVFP4",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": producer,
        "quant_method": "modelopt",
    }


def input_scale(name: str, form: str) -> Tensor:
    """The static scale of a matrix's inputs; k's is smaller than q's and v's."""
    last = {"fp8": 448.0, "int8": 127.5, "nvfp4": 6 * 448.0}
    size = next(value for kind, value in last.items() if kind in form)
    word = name.rpartition(".")[2].removesuffix("_proj")
    reach = 3.0 * (1 + 0.25 * _INPUTS[word]) * (0.75 if word == "k" else 1.0)
    return torch.tensor(reach / size)


def quantized_llama(
    path: Path, form: str, *, group: int = 32, layers: int = 2
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Write a folder; returns its config and what each tensor means, float64, by plain names."""
    config = tiny_llama(path, layers=layers)
    weights = tiny_weights(config, 0)
    means = {name: one.double() for name, one in weights.items()}
    tensors = {name: weights[name] for name in (EMBEDDING, FINAL_NORM, HEAD) if name in weights}
    ignored = ["lm_head"]
    if form == "fbgemm_fp8":  # as Meta's release: attention is left as it was
        ignored += [f"model.layers.{i}.self_attn" for i in range(config.num_layers)]
    for layer in range(config.num_layers):
        for name, shape in layer_tensors(config, layer).items():
            module = name.removesuffix(".weight")
            kept = len(shape) == 1 or any(module.startswith(one) for one in ignored)
            if kept:
                tensors[name] = weights[name]
                continue
            made, full = _write(module, shape, form, group, len(tensors))
            # levels of random size: scale the product back to what the model was made for
            ends = ("scale", "scales", "scale_inv", "scale_2")
            scales = next(one for one in made if one.endswith(ends))
            factor = 2.0 ** round(float(torch.log2(1.5 / shape[1] ** 0.5 / full.std())))
            made[scales] = (made[scales].double() * factor).to(made[scales].dtype)
            tensors |= made
            means[name] = full * factor
            if form in STATIC and not form.endswith("token"):
                scale = input_scale(module, form)
                means[f"{module}.input_scale"] = scale.double()
                in_list = form.startswith("compressed") or form.startswith("int8")
                tensors[f"{module}.input_scale"] = scale[None] if in_list else scale
            if form.startswith("modelopt") and name.endswith(("k_proj.weight", "v_proj.weight")):
                tensors[f"{module}.{name[-13]}_scale"] = torch.tensor(0.25)
    write_safetensors(path / "model.safetensors", tensors)
    settings = json.loads((path / "config.json").read_text())
    described = quantization_config(form, group, ignored)
    if form == "modelopt-fp8":
        (path / "hf_quant_config.json").write_text(json.dumps(described))
    else:
        settings["quantization_config"] = described
    (path / "config.json").write_text(json.dumps(settings))
    _write_tokenizer(path / "tokenizer.json", config.vocab_size)
    return config, means


def fused_llama4(path: Path, form: str) -> Llama4Config:
    """Write a layer of Llama 4 with the tensors that ModelOpt exports; the numbers mean little."""
    config = tiny_llama4(path, layers=1, experts=2)
    hidden, inner = config.hidden_size, config.intermediate_size
    folder = TensorFolder.of(path)
    tensors = {name: folder.tensor(name).clone() for name in folder.names}
    ignored = [name.removesuffix(".weight") for name in tensors if "experts" not in name]
    for name, columns, rows in (("gate_up_proj", hidden, 2 * inner), ("down_proj", inner, hidden)):
        fused = f"model.layers.0.feed_forward.experts.{name}"
        tensors[f"{fused}_input_scale"] = tensors[f"{fused}_weight_scale"] = torch.tensor(0.01)
        if form == "modelopt-fp8":
            tensors[fused] = tensors[fused].to(torch.float8_e4m3fn)
            continue
        tensors[f"{fused}_weight_scale_2"] = torch.tensor(0.01)
        scales = torch.ones(2, columns // 16, rows).to(torch.float8_e4m3fn)
        tensors[f"{fused}_weight_scale"] = scales
        tensors[fused] = torch.ones(2, columns // 2, rows, dtype=torch.uint8)
    write_safetensors(path / "model.safetensors", tensors)
    described = modelopt_config(form, [*ignored, "model.layers.0.feed_forward.shared_expert*"])
    if form == "modelopt-fp8":
        (path / "hf_quant_config.json").write_text(json.dumps(described))
    else:
        settings = json.loads((path / "config.json").read_text())
        settings["quantization_config"] = described
        (path / "config.json").write_text(json.dumps(settings))
    return config


def fp8_llama4(path: Path, **settings: Any) -> Llama4Config:  # noqa: ANN401
    """Write a Llama 4 whose routed experts are float8 with rounded inputs, as Meta's release."""
    config = tiny_llama4(path, **settings)
    folder = TensorFolder.of(path)
    tensors = {name: folder.tensor(name).clone() for name in folder.names}
    kept = [name.removesuffix(".weight") for name in tensors if ".experts." not in name]
    for name in [name for name in tensors if ".experts." in name]:
        prefix, _, projection = name.rpartition(".")
        for expert, weight_IO in enumerate(tensors.pop(name)):
            parts = {projection: weight_IO.T}
            if projection == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), weight_IO.T.chunk(2), strict=True))
            for part, weight_OI in parts.items():
                made = quantize_fp8(weight_OI)
                module = f"{prefix}.{expert}.{part}"
                tensors[f"{module}.weight"] = made.data.view(torch.float8_e4m3fn)
                tensors[f"{module}.weight_scale"] = made.scales
    write_safetensors(path / "model.safetensors", tensors)
    described = json.loads((path / "config.json").read_text())
    described["quantization_config"] = quantization_config("fbgemm_fp8", 0, kept)
    (path / "config.json").write_text(json.dumps(described))
    return config


def _write_tokenizer(file: Path, vocab_size: int) -> None:
    """A tokenizer without merges: a folder without a tokenizer is none that can be served."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocab_size]
    vocab = {letter: token for token, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(file))


def _write(
    name: str, shape: tuple[int, ...], form: str, group: int, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = shape
    layer = int(name.split(".")[2])
    order = 10 * layer + _INPUTS[name.split(".")[-1].removesuffix("_proj")]
    if "nvfp4" in form:
        return nvfp4(name, rows, columns, seed)
    if form == "modelopt-fp8":
        return float8(name, rows, columns, seed)
    if form == "awq":
        tensors, full = awq(name, rows, columns, group, seed)
    elif form.startswith("gptq"):
        tensors, full = gptq(
            name,
            rows,
            columns,
            group,
            seed,
            act_order=form == "gptq-act-order",
            version=2 if form == "gptq-v2" else 1,
            order_seed=order,
        )
        if form == "gptq-no-index":
            del tensors[f"{name}.g_idx"]
    elif form.startswith("packed"):
        bits = int(form.split("-")[1])
        tensors, full = packed(
            name,
            rows,
            columns,
            group if bits == 4 else columns,
            seed,
            bits,
            form.endswith("zeros"),
            order if "group" in form else None,
        )
    elif form.startswith(("int8", "fp8")) or "tensor" in form:
        tensors, full = eight_bits(
            name,
            rows,
            columns,
            seed,
            float8=not form.startswith("int8"),
            per_tensor="tensor" in form,
            scale="weight_scale_inv" if form.endswith("inv") else "weight_scale",
        )
    else:
        dtype = torch.float32 if form == "fbgemm_fp8" else torch.bfloat16
        tensors, full = fp8(name, rows, columns, seed, dtype)
    return tensors, torch.from_numpy(full)


def dense_logits(
    config: ModelConfig,
    means: dict[str, Tensor],
    tokens: list[int],
    inputs: Callable[[Tensor, str], Tensor] = lambda h, name: h,
) -> Tensor:
    """Logits [T, V] of a Llama in float64, written out: nothing here shares code with the product.

    Names are the plain checkpoint's; rope by halves. `inputs` rounds what the matrix `name` of a
    layer multiplies.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * means[name]

    length, d = len(tokens), config.head_dim
    angle = torch.outer(torch.arange(length).double(), config.inv_freq().double())
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = means[EMBEDDING][tokens]
    mask = torch.full((length, length), -torch.inf).triu(1).double()
    for i in range(config.num_layers):
        at = f"model.layers.{i}."

        def times(h: Tensor, name: str, at: str = at) -> Tensor:
            return inputs(h, f"{at}{name}") @ means[f"{at}{name}.weight"].T

        h = norm(x, at + "input_layernorm.weight")
        q = rotate(times(h, "self_attn.q_proj").view(length, -1, d))
        k = rotate(times(h, "self_attn.k_proj").view(length, -1, d))
        v = times(h, "self_attn.v_proj").view(length, -1, d)
        each = config.num_heads // config.num_kv_heads
        k, v = (one.repeat_interleave(each, 1).transpose(0, 1) for one in (k, v))
        scores = q.transpose(0, 1) @ k.mT * d**-0.5 + mask
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
        x = x + times(mixed, "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = times(h, "mlp.gate_proj"), times(h, "mlp.up_proj")
        x = x + times(gate * gate.sigmoid() * up, "mlp.down_proj")
    return norm(x, FINAL_NORM) @ means.get(HEAD, means[EMBEDDING]).T


def _unpacked(words_OW: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of int32 words, lowest bits first: as compressed-tensors documents it."""
    parts = [words_OW >> bits * i & (1 << bits) - 1 for i in range(32 // bits)]
    return torch.stack(parts, -1).flatten(1)


def meaning(folder: TensorFolder, module: str) -> Tensor:
    """The matrix that a module's tensors stand for, float64, by the format's own words."""
    names = {one.rpartition(".")[2] for one in folder.names if one.startswith(module + ".")}
    scale = folder.tensor(f"{module}.weight_scale").double()
    if names == {"weight", "weight_scale"}:
        return folder.tensor(f"{module}.weight").double() * scale
    rows, columns = folder.tensor(f"{module}.weight_shape").tolist()
    words = folder.tensor(f"{module}.weight_packed")
    bits = words.shape[1] * 32 // columns
    zero = torch.tensor(float(1 << bits - 1)).double()
    group = columns // scale.shape[1]
    if "weight_zero_point" in names:
        packed_rows = folder.tensor(f"{module}.weight_zero_point")
        zero = _unpacked(packed_rows.t().contiguous(), 4).t()[:rows].double()
        zero = zero.repeat_interleave(group, 1)
    full = (_unpacked(words, bits) - zero) * scale.repeat_interleave(group, 1)
    assert full.shape == (rows, columns)
    return full
