"""The record of the dense Qwen3 family."""

from __future__ import annotations

from collections.abc import Collection
from importlib.resources import files
from typing import Any

from arriero.shards.families.family import GgufFamily, ModelFamily, TokenSplit
from arriero.shards.layout.dense import partition
from arriero.shards.layout.windows import window_mask
from arriero.shards.models.qwen3.config import QWEN3_ARCHITECTURE, Qwen3Config
from arriero.shards.models.qwen3.tensors import qwen3_modules

_MARKS = {"<|im_start|>", "<|im_end|>", "<tool_call>", "<think>"}
"""Special tokens that together only Qwen3's tokenizers have."""
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's split, with a piece for each digit."""


def chat_template(specials: Collection[str]) -> str | None:
    """The documented chat format, with tool calls as JSON between `<tool_call>` marks."""
    if not set(specials) >= _MARKS:
        return None
    return files(__package__).joinpath("chat.jinja").read_text(encoding="utf-8")


def _sizes(layers: int, hidden: int, mlp: int, heads: int, *, tied: bool = False) -> dict[str, Any]:
    return {
        "architectures": [QWEN3_ARCHITECTURE],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }


FAMILY: ModelFamily[Qwen3Config] = ModelFamily(
    name="Qwen3",
    architectures=(QWEN3_ARCHITECTURE,),
    model_types=("qwen3",),
    read_config=Qwen3Config.from_dict,
    partition=partition,
    modules=lambda model, fused: qwen3_modules(model),
    attention_mask=window_mask,
    slice="arriero.shards.models.qwen3.slice:Qwen3Slice",
    catalog={
        "qwen3-0.6b": _sizes(28, 1024, 3072, 16, tied=True),
        "qwen3-1.7b": _sizes(28, 2048, 6144, 16, tied=True),
        "qwen3-4b": _sizes(36, 2560, 9728, 32, tied=True),
        "qwen3-8b": _sizes(36, 4096, 12288, 32),
        "qwen3-14b": _sizes(40, 5120, 17408, 40),
        "qwen3-32b": _sizes(64, 5120, 25600, 64),
    },
    gguf=GgufFamily(
        architecture="qwen3",
        config={"architectures": [QWEN3_ARCHITECTURE], "model_type": "qwen3"},
        layer_names={"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
        splits={"qwen2": TokenSplit(pattern=_SPLIT, normalizes=True)},
    ),
    chat_template=chat_template,
)
