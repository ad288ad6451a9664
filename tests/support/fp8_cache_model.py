"""Dense models with an fp8 KV cache, written out in plain torch; shares no code with the product.

Llama, Qwen3, and Llama 4 without experts and chunks.

Keys and values are divided by a power of two, rounded to e4m3, and multiplied by it again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def _norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _stored(x: Tensor, scale: float) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def _rope(x: Tensor, theta: float, *, pairs: bool) -> Tensor:
    length, _, d = x.shape
    angle = torch.arange(length)[:, None] / theta ** (torch.arange(0, d, 2) / d)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    split = x.unflatten(-1, (-1, 2)) if pairs else x.unflatten(-1, (2, -1)).mT
    turned = torch.view_as_real(torch.view_as_complex(split.contiguous()) * turn)
    return turned.flatten(-2) if pairs else turned.mT.flatten(-2)


def _queries_keys(
    settings: Mapping[str, Any], q: Tensor, k: Tensor, norms: list[Tensor | None], layer: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys after norms and RoPE."""
    eps, position = settings["rms_norm_eps"], torch.arange(len(q))
    both = [
        x if weight is None else _norm(x, eps) * weight
        for x, weight in zip((q, k), norms, strict=True)
    ]
    llama4 = settings["model_type"] == "llama4_text"
    if not llama4 or settings["no_rope_layers"][layer]:
        both = [_rope(x, settings["rope_theta"], pairs=llama4) for x in both]
        if llama4:
            both = [_norm(x, eps) for x in both]
    else:
        step = torch.floor((position + 1) / settings["floor_scale"])
        both[0] = both[0] * (1 + settings["attn_scale"] * torch.log1p(step))[:, None, None]
    return both[0], both[1]


def fp8_cache_logits(
    path: Path, tokens: list[int], powers: Mapping[int, tuple[float, float]]
) -> Tensor:
    """Logits [T, V]; `powers` divides the keys and the values of a layer, 1 where missing."""
    settings = json.loads((path / "config.json").read_text())
    w = load_file(path / "model.safetensors")
    d, eps = settings["head_dim"], settings["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][tokens]
    sees = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for layer in range(settings["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        mlp = name + ("mlp." if f"{name}mlp.up_proj.weight" in w else "feed_forward.")

        def product(of: str, h: Tensor) -> Tensor:
            y, bias = h @ w[f"{of}.weight"].T, w.get(f"{of}.bias")
            return y if bias is None else y + bias

        h = _norm(x, eps) * w[f"{name}input_layernorm.weight"]
        q, k, v = (product(f"{name}self_attn.{c}_proj", h).unflatten(-1, (-1, d)) for c in "qkv")
        norms = [w.get(f"{name}self_attn.{c}_norm.weight") for c in "qk"]
        q, k = _queries_keys(settings, q, k, norms, layer)
        k_power, v_power = powers.get(layer, (1.0, 1.0))
        group = q.shape[1] // k.shape[1]
        k, v = (
            _stored(y, power).repeat_interleave(group, 1)
            for y, power in ((k, k_power), (v, v_power))
        )
        scores = torch.einsum("ind,jnd->nij", q, k) / math.sqrt(d)
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
        attended = torch.einsum("nij,jnd->ind", weights, v).flatten(1)
        x = x + product(f"{name}self_attn.o_proj", attended)
        h = _norm(x, eps) * w[f"{name}post_attention_layernorm.weight"]
        gate, up = (product(f"{mlp}{part}_proj", h) for part in ("gate", "up"))
        x = x + product(f"{mlp}down_proj", torch.nn.functional.silu(gate) * up)
    return (_norm(x, eps) * w["model.norm.weight"]) @ w["lm_head.weight"].T
