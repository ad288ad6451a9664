"""Models and devices that a plan can name although none is at hand.

The memory of a device is the size that the driver gives a program, less than the name says. Knows
published numbers; knows nothing of layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.shards.checkpoint.formats.describe import describe, read_settings
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.errors import SpecError
from arriero.shards.layout.parts import AnyModel
from arriero.shards.model_config.llama4 import LLAMA4_ARCHITECTURES

_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """An accelerator, or the share of a machine that a slice gets.

    Attributes:
        name: as in `--gpu`.
        memory_bytes: bytes that a program can allocate.
        bandwidth: bytes per second from the device's memory.
        fp8: the device multiplies float8.
        cuda: the GPU backend runs on the device.
        context_bytes: bytes of the driver and its libraries in each process.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    fp8: bool = True
    cuda: bool = True
    context_bytes: int = _GIB


def _gpu(name: str, gib: float, tb_s: float, *, fp8: bool = True) -> Device:
    return Device(name=name, memory_bytes=int(gib * _GIB), bandwidth=tb_s * 1e12, fp8=fp8)


DEVICES = {
    entry.name: entry
    for entry in (
        _gpu("h100-80g", 79.1, 3.35),
        _gpu("h200-141g", 139.7, 4.8),
        _gpu("a100-40g", 39.4, 1.55, fp8=False),
        _gpu("a100-80g", 79.1, 2.04, fp8=False),
        _gpu("b200-192g", 178.3, 8.0),
        _gpu("l40s-48g", 44.4, 0.86),
        _gpu("a10-24g", 22.1, 0.6, fp8=False),
        _gpu("l4-24g", 22.0, 0.3),
        _gpu("rtx4090-24g", 23.5, 1.01),
        _gpu("mi300x-192g", 191.5, 5.3),
    )
}
CPU_BANDWIDTH = 2e10
"""Bytes per second of a machine's memory, a low estimate; all slices of the machine share them."""


def cpu(memory_bytes: int, slices: int) -> Device:
    """The share of a machine's memory and bandwidth that each of `slices` slices gets."""
    return Device(
        name="cpu",
        memory_bytes=memory_bytes // slices,
        bandwidth=CPU_BANDWIDTH / slices,
        cuda=False,
        context_bytes=300 * 10**6,
    )


def device(name: str, memory_bytes: int | None, slices: int) -> Device:
    """The device `name`, with another memory size where `memory_bytes` is given.

    Args:
        name: a name of `DEVICES`, or "cpu".
        memory_bytes: bytes of the device; for "cpu" bytes of the machine.
        slices: number of slices that share a machine (for "cpu").

    Raises:
        SpecError: the name is unknown, or "cpu" comes without `memory_bytes`.
    """
    if name == "cpu":
        if memory_bytes is None:
            raise SpecError("`gpu`=cpu needs the memory of each machine; add --memory 64GiB")
        return cpu(memory_bytes, slices)
    entry = DEVICES.get(name)
    if entry is None:
        raise SpecError(f"`gpu`={name!r} is none of {', '.join(DEVICES)}, cpu")
    if memory_bytes is None:
        return entry
    return Device(
        name=entry.name, memory_bytes=memory_bytes, bandwidth=entry.bandwidth, fp8=entry.fp8
    )


_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama(
    layers: int,
    hidden: int,
    mlp: int,
    heads: int,
    kv_heads: int,
    head_dim: int = 128,
    **more: Any,  # noqa: ANN401
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA31_ROPE,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
    } | more


_VISION = {
    "hidden_size": 1408,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "image_size": 336,
    "patch_size": 14,
    "num_channels": 3,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 4096,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def _llama4(experts: int, step: int, positions: int, qk_norm: bool, rope: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "architectures": [LLAMA4_ARCHITECTURES[0]],
        "model_type": "llama4",
        "image_token_index": 200092,
        "torch_dtype": "bfloat16",
        "vision_config": dict(_VISION),
        "text_config": {
            "vocab_size": 202048,
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": experts,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": step,
            "use_qk_norm": qk_norm,
            "attention_chunk_size": 8192,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": rope,
            "max_position_embeddings": positions,
            "bos_token_id": 200000,
            "eos_token_id": [200001, 200007, 200008],
            "torch_dtype": "bfloat16",
        },
    }


_LLAMA32: dict[str, Any] = {
    "rope_scaling": _LLAMA31_ROPE | {"factor": 32.0},
    "tie_word_embeddings": True,
}
_SCOUT_ROPE = _LLAMA31_ROPE | {"factor": 16.0, "high_freq_factor": 1.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, 8),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64, 8),
    "llama-3.3-70b": _llama(80, 8192, 28672, 64, 8),
    "llama-3.1-405b": _llama(126, 16384, 53248, 128, 8),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, 8, 64, **_LLAMA32),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, 8, **_LLAMA32),
    "llama-4-scout": _llama4(16, 1, 10_485_760, True, _SCOUT_ROPE),
    "llama-4-maverick": _llama4(128, 2, 1_048_576, False, None),
    "smollm2-135m": _llama(
        30,
        576,
        1536,
        9,
        3,
        64,
        vocab_size=49152,
        rope_theta=100000.0,
        rope_scaling=None,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
"""The fields of each model's config.json that decide memory; see `read_settings`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedModel:
    """A model to plan for.

    Attributes:
        name: a name of `MODELS`, or the name of the folder.
        config: sizes of the model.
        scheme: quantization of the checkpoint; None for plain weights.
    """

    name: str
    config: AnyModel
    scheme: QuantScheme | None = None


def find_model(name: str) -> NamedModel:
    """The model `name` of `MODELS`, or the model in the folder `name`.

    Raises:
        SpecError: `name` is neither a known model nor a folder.
        CheckpointError: the folder's config.json is not valid.
    """
    settings = MODELS.get(name.lower())
    if settings is not None:
        config, scheme = read_settings(settings, source=name)
        return NamedModel(name=name.lower(), config=config, scheme=scheme)
    if not Path(name).is_dir():
        raise SpecError(f"`model`={name!r} is neither a folder nor one of {', '.join(MODELS)}")
    config, scheme = describe(name)
    return NamedModel(name=Path(name).resolve().name, config=config, scheme=scheme)
