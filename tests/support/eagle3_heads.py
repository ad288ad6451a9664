"""EAGLE-3 heads with random weights, in both published layouts, and a reference in plain torch.

Knows the published layouts and the equations of a head; knows nothing of slices and engines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.models import write_safetensors

EPS = 1e-5


def head_settings(
    *,
    layout: str = "flat",
    vocab: int = 128,
    draft_vocab: int = 48,
    hidden: int = 64,
    target_hidden: int | None = None,
    intermediate: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    taps: list[int] | None = None,
    rope_theta: float = 10000.0,
    dtype: str = "float32",
    **flags: bool,
) -> dict[str, Any]:
    """config.json of a head: flat, as EAGLE's authors publish it, or nested, as speculators do."""
    layer = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "rope_theta": rope_theta,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    more: dict[str, Any] = {"draft_vocab_size": draft_vocab, "torch_dtype": dtype, **flags}
    if target_hidden is not None:
        more["target_hidden_size"] = target_hidden
    if layout == "flat":
        if taps is not None:
            more["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": taps}
        return {"architectures": ["LlamaForCausalLMEagle3"], **layer, **more}
    if taps is not None:
        more["eagle_aux_hidden_state_layer_ids"] = taps
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer | {"torch_dtype": dtype},
        **more,
    }


def head_weights(
    settings: dict[str, Any],
    *,
    seed: int = 0,
    own_embedding: bool = False,
    own_head: bool = True,
) -> dict[str, Tensor]:
    """Seeded float32 weights under the names of the layout; `d2t` names scattered tokens."""
    generator = torch.Generator().manual_seed(seed)
    layer = settings.get("transformer_layer_config", settings)
    prefix = "layers.0." if layer is not settings else "midlayer."
    hidden, mlp, d = layer["hidden_size"], layer["intermediate_size"], layer["head_dim"]
    q, kv = layer["num_attention_heads"] * d, layer["num_key_value_heads"] * d
    vocab, draft = layer["vocab_size"], settings["draft_vocab_size"]
    target = settings.get("target_hidden_size", hidden)
    ids = settings.get("eagle_config", settings).get("eagle_aux_hidden_state_layer_ids")
    taps = 3 if ids is None else len(ids)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def vector(size: int) -> Tensor:
        return 1.0 + 0.1 * torch.randn(size, generator=generator)

    weights = {
        "fc.weight": matrix(hidden, taps * target),
        **{
            f"{prefix}{name}.weight": vector(hidden)
            for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        },
        f"{prefix}self_attn.q_proj.weight": matrix(q, 2 * hidden),
        f"{prefix}self_attn.k_proj.weight": matrix(kv, 2 * hidden),
        f"{prefix}self_attn.v_proj.weight": matrix(kv, 2 * hidden),
        f"{prefix}self_attn.o_proj.weight": matrix(hidden, q),
        f"{prefix}mlp.gate_proj.weight": matrix(mlp, hidden),
        f"{prefix}mlp.up_proj.weight": matrix(mlp, hidden),
        f"{prefix}mlp.down_proj.weight": matrix(hidden, mlp),
        "norm.weight": vector(hidden),
    }
    if settings.get("norm_before_fc"):
        weights["input_norm.weight"] = vector(taps * target)
    if settings.get("fc_norm"):
        weights |= {f"fc_norm.{i}.weight": vector(target) for i in range(taps)}
    if own_embedding:
        weights["embed_tokens.weight"] = torch.randn(vocab, hidden, generator=generator)
    if own_head:
        weights["lm_head.weight"] = matrix(draft, hidden)
    if draft < vocab:
        tokens = torch.randperm(vocab, generator=generator)[:draft].sort().values
        weights["d2t"] = tokens - torch.arange(draft)
        weights["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, tokens, True)
    return weights


def write_head(path: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """Write the folder of a head; floats take the dtype of the config."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    dtype = getattr(torch, settings["torch_dtype"])
    write_safetensors(
        path / "model.safetensors",
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()},
    )
    return path


def random_head(path: Path, target: Path, *, draft_vocab: int, seed: int = 0) -> Path:
    """Write a head with random weights for the model in a folder, which lends its embedding."""
    config = json.loads((target / "config.json").read_text())
    config = config.get("text_config", config)
    settings = head_settings(
        vocab=config["vocab_size"],
        draft_vocab=draft_vocab,
        hidden=config["hidden_size"],
        intermediate=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim"),
    )
    return write_head(path, settings, head_weights(settings, seed=seed))


class ReferenceHead:
    """The equations of a head in plain torch, in float64, over a whole sequence at once."""

    def __init__(
        self, settings: dict[str, Any], weights: dict[str, Tensor], embedding: Tensor
    ) -> None:
        self.layer = settings.get("transformer_layer_config", settings)
        nested = self.layer is not settings
        self.prefix = "layers.0." if nested else "midlayer."
        self.flags = {"norm_before_residual": nested} | settings
        self.weights = {name: weight.double() for name, weight in weights.items()}
        self.embedding = embedding.double()

    def __call__(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Outputs [T, H] before the norm of rows 0 .. T-1; row t has the token at t + 1."""
        name = self.prefix
        h = self._norm(features, f"{name}hidden_norm")
        x = torch.cat([self._norm(self.embedding[tokens], f"{name}input_layernorm"), h], 1)
        y = (h if self.flags["norm_before_residual"] else features) + self._attention(x)
        g = self._norm(y, f"{name}post_attention_layernorm")
        gate, up = (self._product(g, f"{name}mlp.{part}_proj") for part in ("gate", "up"))
        return y + self._product(F.silu(gate) * up, f"{name}mlp.down_proj")

    def fuse(self, taps: list[Tensor]) -> Tensor:
        if self.flags.get("fc_norm"):
            taps = [self._norm(tap.double(), f"fc_norm.{i}") for i, tap in enumerate(taps)]
        x = torch.cat(taps, 1).double()
        if self.flags.get("norm_before_fc"):
            x = self._norm(x, "input_norm")
        return self._product(x, "fc")

    def next_feature(self, y: Tensor) -> Tensor:
        return self._norm(y, "norm") if self.flags.get("norm_output") else y

    def logits(self, y: Tensor) -> Tensor:
        return self._norm(y, "norm") @ self.weights["lm_head.weight"].T

    def _attention(self, x: Tensor) -> Tensor:
        length, d = len(x), self.layer["head_dim"]
        q, k, v = (
            self._product(x, f"{self.prefix}self_attn.{n}_proj").view(length, -1, d).transpose(0, 1)
            for n in "qkv"
        )
        exponents = torch.arange(0, d, 2, dtype=torch.float64) / d
        angles = torch.arange(length)[:, None] / self.layer["rope_theta"] ** exponents
        cos, sin = angles.cos(), angles.sin()

        def rotate(z: Tensor) -> Tensor:
            a, b = z.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        out = F.scaled_dot_product_attention(
            rotate(q)[None], rotate(k)[None], v[None], is_causal=True, enable_gqa=True
        )[0]
        out = out.transpose(0, 1).reshape(length, -1)
        return self._product(out, f"{self.prefix}self_attn.o_proj")

    def _product(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[f"{name}.weight"], EPS)
