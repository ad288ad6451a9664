"""config.json and generation_config.json from the GGUF metadata of a dense model.

Knows the keys that GGUF's dense architectures share; knows nothing of weights, except the frequency
factors: a GGUF file records Llama 3's rotary scaling nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from arriero.shards.checkpoint.gguf_header import GgufFile
from arriero.shards.checkpoint.gguf_tokenizer import LLAMA3_FAMILIES, family_of, special_token
from arriero.shards.errors import CheckpointError
from arriero.shards.families.family import GgufFamily, ModelFamily
from arriero.shards.families.registry import families
from arriero.shards.layout.parts import AnyModel

ROPE_FACTORS = "rope_freqs.weight"

# Llama 3.1 to 3.3, then Llama 4 Scout's: (low, high, original positions).
_LLAMA3_RULES = ((1.0, 4.0, 8192), (1.0, 1.0, 8192))
_LLAMA3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file with the family of its model.

    Attributes:
        file: the file.
        family: a family that GGUF files can store.
        gguf: how GGUF files store the family.
    """

    file: GgufFile
    family: ModelFamily[Any]
    gguf: GgufFamily

    def value(self, key: str, default: Any = None) -> Any:  # noqa: ANN401
        """Value of a key of the architecture."""
        return self.file.metadata.get(self.name(key), default)

    def name(self, key: str) -> str:
        """Full name of a key of the architecture."""
        return f"{self.gguf.architecture}.{key}"

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1.

        Raises:
            CheckpointError: the key is missing or has another value.
        """
        value = self.value(key, default)
        if isinstance(value, list) and value and all(size == value[0] for size in value):
            value = value[0]  # a value for each layer, all equal
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise CheckpointError(
                f"{self.file.path}: {self.name(key)}={str(value)[:100]} must be a whole number "
                "from 1"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number.

        Raises:
            CheckpointError: the key is missing or has another value.
        """
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"{self.file.path}: {self.name(key)}={str(value)[:100]} must be a number"
            )
        return float(str(np.float32(value)))  # 1e-05, not float32's 9.999999747378752e-06

    def config(
        self, settings: dict[str, Any], generation: dict[str, Any] | None = None
    ) -> AnyModel:
        """The model of the objects of config.json and generation_config.json.

        Raises:
            CheckpointError: the settings do not fit each other.
        """
        model: AnyModel = self.family.read_config(settings, generation, source=str(self.file.path))
        return model


def find_gguf_model(file: GgufFile) -> GgufModel:
    """The file with its family.

    Raises:
        CheckpointError: no family has the file's architecture, or the model has experts.
    """
    architecture = file.metadata.get("general.architecture")
    known = {family.gguf.architecture: family for family in families() if family.gguf is not None}
    family = known.get(architecture) if isinstance(architecture, str) else None
    if family is None or family.gguf is None:
        raise CheckpointError(
            f"{file.path}: general.architecture={str(architecture)[:100]!r} is not supported; "
            f"supported: {', '.join(known)}"
        )
    model = GgufModel(file, family, family.gguf)
    if model.value("expert_count"):
        raise CheckpointError(
            f"{file.path}: {model.name('expert_count')}: a model with experts cannot be imported; "
            "convert the original checkpoint"
        )
    return model


def build_configs(model: GgufModel, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The objects of config.json and generation_config.json.

    Args:
        model: GGUF file of a supported architecture.
        dtype: dtype of the written weights.

    Raises:
        CheckpointError: an unsupported feature, or missing keys.
    """
    file = model.file
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{file.path}: has no two-dimensional tensor token_embd.weight; fetch the file again"
        )
    vocab_size = embedding.shape[0]
    hidden_size = model.size("embedding_length")
    num_heads = model.size("attention.head_count")
    head_dim = model.size("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if model.size(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: {model.name(key)}={model.size(key)} differs from the head size "
                f"{head_dim}; this is not supported"
            )
    bos = special_token(file, "bos", vocab_size)
    ends = _end_tokens(file, vocab_size)
    config: dict[str, Any] = {
        **model.gguf.config,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": model.size("feed_forward_length"),
        "num_hidden_layers": model.size("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": model.size("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": model.size("context_length"),
        "rope_theta": model.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "bos_token_id": bos,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": special_token(file, "padding", vocab_size),
        "torch_dtype": dtype,
    }
    config["rope_scaling"] = _rope_scaling(model, config)
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return config, generation


def _end_tokens(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    ends = [special_token(file, role, vocab_size) for role in ("eos", "eot", "eom")]
    if family_of(file) in LLAMA3_FAMILIES:
        # a file names one end token, but the family has three
        tokens = file.metadata.get("tokenizer.ggml.tokens", [])
        ends += [tokens.index(text) for text in _LLAMA3_ENDS if text in tokens]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def _rope_scaling(model: GgufModel, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = model.value("rope.scaling.type", "none")
    old = model.value("rope.scale_linear")  # files of 2023
    if kind == "none" and old is not None and old != 1:
        return {"rope_type": "linear", "factor": model.number("rope.scale_linear")}
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{model.file.path}: {model.name('rope.scaling.type')}={str(kind)[:100]!r} is not "
            "supported; supported: none, linear and llama3 (with the tensor rope_freqs.weight)"
        )
    if ROPE_FACTORS in model.file.tensors:
        return _llama3_scaling(model, config)
    if kind == "none":
        return None
    return {"rope_type": "linear", "factor": model.number("rope.scaling.factor")}


def _llama3_scaling(model: GgufModel, config: dict[str, Any]) -> dict[str, Any]:
    """The llama3 rule that gives the stored factors: unscaled frequency / scaled frequency."""
    file = model.file
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.shape != (config["head_dim"] // 2,):
        raise CheckpointError(
            f"{file.path}: tensor {ROPE_FACTORS!r} has shape {list(tensor.shape)}, but the head "
            f"size requires {[config['head_dim'] // 2]}; fetch the file again"
        )
    stored = torch.from_numpy(np.array(file.rows(tensor, 0, 1)[0]))
    plain = model.config(config).inv_freq()
    original = model.value("rope.scaling.original_context_length")
    for low, high, positions in _LLAMA3_RULES:
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(stored.max()), 4),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original or positions,
        }
        scaled = model.config(config | {"rope_scaling": scaling}).inv_freq()
        if torch.allclose(plain / scaled, stored, rtol=1e-4):
            return scaling
    raise CheckpointError(
        f"{file.path}: tensor {ROPE_FACTORS!r} holds frequency factors of no known llama3 rule; "
        "convert the original checkpoint instead"
    )
