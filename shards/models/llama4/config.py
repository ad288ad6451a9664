"""Config of a Llama 4 model, from a folder's `config.json`.

Knows the settings of text model and vision tower, and the layers with experts, RoPE and chunked
attention; refuses each setting that changes the computation in an unsupported way. Knows nothing
of tensors, slices and engines. Needs torch only for the rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from arriero.shards.files.json_file import read_json_object
from arriero.shards.model_config.dense import (
    end_tokens,
    read_activation,
    read_heads,
    read_rope,
    read_torch_dtype,
)
from arriero.shards.model_config.end_tokens import with_tokenizer_ends
from arriero.shards.model_config.fields import Fields
from arriero.shards.model_config.rope import RopeConfig

if TYPE_CHECKING:  # leaders and gateways read a config without loading torch
    from torch import Tensor

LLAMA4_ARCHITECTURES = ("Llama4ForConditionalGeneration", "Llama4ForCausalLM")

_MAX_LAYERS = 4096  # bounds the memory that a hostile config can cause
_MAX_EXPERTS = 65536
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower and its projection into the text model.

    Attributes:
        hidden_size, num_layers, num_heads, intermediate_size: sizes of the tower.
        image_size, patch_size, num_channels: side of a tile and of a patch in pixels; colours.
        pixel_shuffle_ratio: side of the patch grid after the shuffle divided by the side before.
        projector_input_dim, projector_output_dim: sizes of the adapter's two matrices.
        output_dim: input size of the projection into the text model.
        norm_eps: epsilon of the layer norms.
        rope_theta: base of the two-dimensional rotary embedding.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int
    pixel_shuffle_ratio: float
    projector_input_dim: int
    projector_output_dim: int
    output_dim: int
    norm_eps: float
    rope_theta: float

    @property
    def num_positions(self) -> int:
        """Number of patches of a tile plus the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def features_per_tile(self) -> int:
        """Number of features of a tile: patches after the pixel shuffle."""
        return round((self.image_size // self.patch_size) * self.pixel_shuffle_ratio) ** 2

    @property
    def patch_features(self) -> int:
        """Number of values in a patch."""
        return self.num_channels * self.patch_size**2

    def num_parameters(self, text_hidden_size: int) -> int:
        """Number of weights of tower, adapter and projection."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        layer = 4 * hidden * (hidden + 1) + 2 * hidden * mlp + mlp + hidden + 4 * hidden
        tower = self.num_layers * layer + 4 * hidden + hidden
        tower += hidden * self.patch_features + self.num_positions * hidden
        adapter = mlp * self.projector_input_dim + self.projector_output_dim**2
        return tower + adapter + self.output_dim * text_hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama4Config:
    """A Llama 4 model: interleaved dense and routed layers, chunked and global attention.

    A model without routed layers, such as Llama Guard 4, has `num_experts`, `top_k` 0.

    Attributes:
        architecture: one of `LLAMA4_ARCHITECTURES`.
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, rms_norm_eps,
            rope, max_position_embeddings, tie_word_embeddings, torch_dtype, bos_token_id,
            eos_token_ids: as in `ModelConfig`.
        intermediate_size: columns of each routed and shared expert.
        intermediate_size_mlp: columns of the MLP of a dense layer.
        num_experts: number of routed experts of a layer; 0 without routed layers.
        top_k: number of experts for each token; 0 without routed layers.
        moe_layers: layers with experts, in ascending order.
        rope_layers: for each layer, whether the layer has RoPE; such layers have chunked
            attention if `attention_chunk_size` is above 0.
        use_qk_norm: weightless norm of q and k, on layers with RoPE.
        attention_chunk_size: tokens of a chunk; 0 for full attention in all layers.
        attn_temperature: whether q is scaled by position on layers without RoPE.
        floor_scale, attn_scale: parameters of this scaling.
        vision: the vision tower; None without `vision_config` or for a text-only checkpoint.
        image_token: placeholder that image features replace; None without vision.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    rope_layers: tuple[bool, ...]
    use_qk_norm: bool
    attention_chunk_size: int
    attn_temperature: bool
    floor_scale: float
    attn_scale: float
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    torch_dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    vision: VisionConfig | None = None
    image_token: int | None = None

    @classmethod
    def from_folder(cls, path: Path | str) -> Llama4Config:
        """Read config.json, generation_config.json and the tokenizer's end token.

        Raises:
            CheckpointError: missing or malformed file, or an unsupported model.
        """
        folder = Path(path)
        file, more = folder / "config.json", folder / "generation_config.json"
        generation = read_json_object(more, _MAX_CONFIG_BYTES) if more.is_file() else None
        model = cls.from_dict(
            read_json_object(file, _MAX_CONFIG_BYTES), generation, source=str(file)
        )
        return with_tokenizer_ends(model, folder)

    @classmethod
    def from_dict(
        cls,
        settings: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        *,
        source: str = "config.json",
    ) -> Llama4Config:
        """A model config from the objects of config.json and generation_config.json.

        Args:
            settings: object of config.json; the fields of the text model are in `text_config`, or
                at the top level for a text-only checkpoint.
            generation: object of generation_config.json, or None without that file.
            source: file name for errors.

        Raises:
            CheckpointError: a missing or malformed field, or an unsupported model.
        """
        whole = Fields(settings, source)
        architecture = _architecture(whole)
        read = whole if whole.get("text_config") is None else _part(whole, "text_config")
        vision = _vision(whole) if architecture == LLAMA4_ARCHITECTURES[0] else None
        _refuse_uncomputed(read)
        vocab_size = read.size("vocab_size")
        num_layers = read.size("num_hidden_layers", most=_MAX_LAYERS)
        num_heads, num_kv_heads = read_heads(read)
        moe_layers = _moe_layers(read, num_layers)
        num_experts, top_k = _experts(read) if moe_layers else (0, 0)
        rope_layers = _rope_layers(read, num_layers)
        max_positions = read.size("max_position_embeddings")
        tied = whole.flag("tie_word_embeddings") or read.flag("tie_word_embeddings")
        more = Fields(generation or {}, source.replace("config.json", "generation_config.json"))
        dtypes = read if read.get("torch_dtype") or read.get("dtype") else whole
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=read.size("hidden_size"),
            intermediate_size=read.size("intermediate_size"),
            intermediate_size_mlp=read.size("intermediate_size_mlp"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=read.size("head_dim"),
            num_experts=num_experts,
            top_k=top_k,
            moe_layers=moe_layers,
            rope_layers=rope_layers,
            use_qk_norm=read.flag("use_qk_norm"),
            attention_chunk_size=_chunk_size(read, rope_layers),
            attn_temperature=_temperature(read),
            floor_scale=read.number("floor_scale", 8192, low=1),
            attn_scale=read.number("attn_scale", 0.1, low=0),
            rms_norm_eps=read.number("rms_norm_eps", 1e-5, low=0),
            rope=_rope(read, max_positions),
            max_position_embeddings=max_positions,
            tie_word_embeddings=tied,
            torch_dtype=read_torch_dtype(dtypes),
            bos_token_id=next(iter(read.tokens("bos_token_id", vocab_size)), None),
            eos_token_ids=end_tokens(more, read, vocab_size),
            vision=vision,
            image_token=None if vision is None else whole.optional_size("image_token_index"),
        )

    @property
    def q_size(self) -> int:
        """Rows of the query matrix, all heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key matrix, all heads together; equal for values."""
        return self.num_kv_heads * self.head_dim

    def inv_freq(self) -> Tensor:
        """Rotary frequencies in radians per position, float32, shape [head_dim / 2]."""
        return self.rope.inv_freq(self.head_dim)

    def routes(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer in self.moe_layers

    def mlp_columns(self, layer: int) -> int:
        """Columns of the shared expert or of the dense MLP of a layer."""
        return self.intermediate_size if self.routes(layer) else self.intermediate_size_mlp

    def num_parameters(self) -> int:
        """Number of weights with vision; a tied head counts once."""
        hidden = self.hidden_size
        layer = 2 * hidden * (self.q_size + self.kv_size) + 2 * hidden
        experts = (self.num_experts + 1) * 3 * hidden * self.intermediate_size
        num_moe = len(self.moe_layers)
        total = self.num_layers * layer + num_moe * (experts + self.num_experts * hidden)
        total += (self.num_layers - num_moe) * 3 * hidden * self.intermediate_size_mlp
        total += (1 if self.tie_word_embeddings else 2) * self.vocab_size * hidden + hidden
        return total + (0 if self.vision is None else self.vision.num_parameters(hidden))


def _architecture(whole: Fields) -> str:
    names = whole.get("architectures")
    architecture = names[0] if isinstance(names, list) and len(names) == 1 else names
    if architecture not in LLAMA4_ARCHITECTURES:
        raise whole.wrong("architectures", names, f"one of {', '.join(LLAMA4_ARCHITECTURES)}")
    return cast(str, architecture)


def _refuse_uncomputed(read: Fields) -> None:
    read_activation(read)
    if read.flag("attention_bias"):
        raise read.wrong(
            "attention_bias", True, "false: attention biases are not supported for Llama 4"
        )


def _part(whole: Fields, name: str) -> Fields:
    settings = whole.get(name)
    if not isinstance(settings, Mapping):
        raise whole.wrong(name, settings, "an object")
    return Fields(settings, f"{whole.source}, {name}")


def _rope(read: Fields, max_positions: int) -> RopeConfig:
    rope = read_rope(read, max_positions)
    if rope.scaling == "yarn":
        raise read.wrong("rope_type", "yarn", "default, linear or llama3 for Llama 4")
    return rope


def _experts(read: Fields) -> tuple[int, int]:
    """Routed experts of a layer, and experts for each token."""
    num_experts = read.size("num_local_experts", most=_MAX_EXPERTS)
    return num_experts, read.size("num_experts_per_tok", 1, num_experts)


def _chunk_size(read: Fields, rope_layers: tuple[bool, ...]) -> int:
    """Tokens of an attention chunk; 0 for full attention in all layers.

    A null in `attention_chunk_size` (Llama Guard 4) means full attention; without the field the
    chunk has 8192 tokens. `layer_types` of later configs may say full attention as well.
    """
    types = read.get("layer_types")
    if types == ["full_attention"] * len(rope_layers):
        return 0
    own = ["chunked_attention" if rope else "full_attention" for rope in rope_layers]
    if types not in (None, own):
        raise read.wrong(
            "layer_types", types, "full_attention for all layers, or chunked for layers with RoPE"
        )
    if "attention_chunk_size" in read.values and read.get("attention_chunk_size") is None:
        return 0
    return read.size("attention_chunk_size", 8192)


def _moe_layers(read: Fields, num_layers: int) -> tuple[int, ...]:
    listed = read.get("moe_layers")
    if listed is None:
        step = read.optional_size("interleave_moe_layer_step")
        if not step and read.optional_size("num_local_experts") == 0:
            return ()
        step = read.size("interleave_moe_layer_step", 1)
        return tuple(range(step - 1, num_layers, step))
    whole = isinstance(listed, list) and all(type(layer) is int for layer in listed)
    if not whole or sorted(set(listed)) != listed or not all(0 <= i < num_layers for i in listed):
        raise read.wrong("moe_layers", listed, f"an ascending list of layers below {num_layers}")
    return tuple(listed)


def _rope_layers(read: Fields, num_layers: int) -> tuple[bool, ...]:
    """Layers with RoPE: 1 in `no_rope_layers`; without this list all but every fourth layer."""
    listed = read.get("no_rope_layers")
    if not listed:
        every = read.size("no_rope_layer_interval", 4)
        return tuple((layer + 1) % every != 0 for layer in range(num_layers))
    plain = isinstance(listed, list) and all(isinstance(entry, int) for entry in listed)
    if not plain or len(listed) != num_layers or not set(listed) <= {0, 1}:
        raise read.wrong("no_rope_layers", listed, f"a list of {num_layers} numbers, each 0 or 1")
    return tuple(bool(entry) for entry in listed)


def _temperature(read: Fields) -> bool:
    """Whether q is scaled by position; configs of 2025 have the number 4 instead of true."""
    value = read.get("attn_temperature_tuning")
    if value is None:
        return True
    if not isinstance(value, bool | int):
        raise read.wrong("attn_temperature_tuning", value, "true or false")
    return bool(value)


def _vision(whole: Fields) -> VisionConfig | None:
    if whole.get("vision_config") is None:
        return None
    read = _part(whole, "vision_config")
    ratio = read.number("pixel_shuffle_ratio", 0.5, low=0.01)
    image, patch = read.size("image_size"), read.size("patch_size")
    if image % patch:
        raise read.wrong("image_size", image, f"a multiple of `patch_size`={patch}")
    wide, out = read.size("projector_input_dim", 4096), read.size("projector_output_dim", 4096)
    if wide != out:
        raise read.wrong("projector_input_dim", wide, f"equal to `projector_output_dim`={out}")
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    if hidden % heads:
        raise read.wrong("num_attention_heads", heads, f"a divisor of `hidden_size`={hidden}")
    rope = read.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    source = Fields({"rope_theta": theta or read.get("rope_theta")}, read.source)
    if read.flag("multi_modal_projector_bias"):
        raise read.wrong("multi_modal_projector_bias", True, "false: this bias is not supported")
    return VisionConfig(
        hidden_size=hidden,
        num_layers=read.size("num_hidden_layers", most=_MAX_LAYERS),
        num_heads=heads,
        intermediate_size=read.size("intermediate_size"),
        image_size=image,
        patch_size=patch,
        num_channels=read.size("num_channels", 3),
        pixel_shuffle_ratio=ratio,
        projector_input_dim=wide,
        projector_output_dim=out,
        output_dim=read.size("vision_output_dim"),
        norm_eps=read.number("norm_eps", 1e-5, low=0),
        rope_theta=source.number("rope_theta", 10000.0, low=1),
    )
