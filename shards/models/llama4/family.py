"""The record of the Llama 4 family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError
from arriero.shards.families.family import ExpertSizes, Fp8Release, ModelFamily
from arriero.shards.layout.moe import MoEPart, partition_moe
from arriero.shards.models.llama4.config import LLAMA4_ARCHITECTURES, Llama4Config
from arriero.shards.models.llama4.tensors import llama4_modules


def _partition(model: Llama4Config, mesh: ParallelConfig) -> Sequence[MoEPart]:
    return partition_moe(model, mesh)


def _attention_mask(model: Llama4Config, group: GroupConfig) -> AttentionMaskSpec:
    window, sinks = group.sliding_window, group.attention_sinks
    if window is not None or sinks:
        chunk = model.attention_chunk_size
        chunks = f"Three layers of four see chunks of {chunk} tokens already, and the others"
        raise SpecError(
            f"`sliding_window`={window}, `attention_sinks`={sinks}: Llama 4 cannot have them. "
            f"{chunks if chunk else 'Layers'} are without positions and carry the whole context, "
            "images included; leave both out"
        )
    return AttentionMaskSpec(chunk_size=model.attention_chunk_size)


def shipped_fp8(model: Llama4Config) -> QuantScheme:
    """The form of Meta's FP8 checkpoint of Llama 4 Maverick: the routed experts."""
    plain = [
        module.name
        for module in llama4_modules(model, fused=False)
        if module.product and module.kind != "experts"
    ]
    return QuantScheme(method="compressed-tensors", ignored=tuple(plain))


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
_SCOUT_ROPE = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def _chunked_layers(model: Llama4Config) -> tuple[bool, ...]:
    return model.rope_layers if model.attention_chunk_size else ()


def _experts(model: Llama4Config) -> ExpertSizes | None:
    if not model.num_experts:
        return None
    return ExpertSizes(num_experts=model.num_experts, top_k=model.top_k)


def _sizes(experts: int, step: int, positions: int, qk_norm: bool, rope: Any) -> dict[str, Any]:  # noqa: ANN401
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


def _guard_sizes() -> dict[str, Any]:
    """Llama Guard 4: Scout's attention and shared experts, without routed experts and chunks."""
    sizes = _sizes(0, 0, 163_840, True, _SCOUT_ROPE)
    sizes["text_config"] |= {
        "intermediate_size_mlp": 8192,
        "num_experts_per_tok": 0,
        "moe_layers": [],
        "attention_chunk_size": None,
    }
    return sizes


FAMILY: ModelFamily[Llama4Config] = ModelFamily(
    name="Llama 4",
    architectures=LLAMA4_ARCHITECTURES,
    read_config=Llama4Config.from_dict,
    partition=_partition,
    modules=llama4_modules,
    attention_mask=_attention_mask,
    slice="arriero.shards.models.llama4.slice:Llama4Slice",
    text_prefix=lambda model: "" if model.vision is None else "language_model.",
    chunked_layers=_chunked_layers,
    attention_chunk=lambda model: model.attention_chunk_size,
    vision=lambda model: model.vision,
    image_token=lambda model: model.image_token,
    experts=_experts,
    fp8_release=Fp8Release(scheme=shipped_fp8, exists=lambda model: model.num_experts > 0),
    catalog={
        "llama-4-scout": _sizes(16, 1, 10_485_760, True, _SCOUT_ROPE),
        "llama-4-maverick": _sizes(128, 2, 1_048_576, False, None),
        "llama-guard-4-12b": _guard_sizes(),
    },
)
