"""Config of a dense model, from a folder's `config.json` and `generation_config.json`.

Knows the settings of the dense Llama family and refuses each setting that changes the computation
in an unsupported way; knows nothing of stored tensors, slices and engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object
from arriero.shards.model_config.end_tokens import with_tokenizer_ends
from arriero.shards.model_config.fields import Fields
from arriero.shards.model_config.rope import RopeConfig, yarn_attention_factor

if TYPE_CHECKING:  # leaders and gateways read a config without loading torch
    from torch import Tensor

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM")
"""Names of the dense family in configs: Llama, an old spelling of 2023, and Mistral, which has the
same layers, with an attention window in the config."""

TORCH_DTYPES = ("bfloat16", "float16", "float32")

_MAX_LAYERS = 4096  # both limits bound the memory that a hostile config can cause
_MAX_HEAD_DIM = 65536
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A dense model of the Llama family.

    Attributes:
        architecture: one of `SUPPORTED_ARCHITECTURES`, or of another family with these numbers.
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: columns of the MLP.
        num_layers: number of decoder layers.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads; divides `num_heads`.
        head_dim: width of a head; even.
        rms_norm_eps: added to the mean square.
        rope: rotary embedding.
        max_position_embeddings: number of positions that the model supports.
        tie_word_embeddings: the head is the embedding.
        attention_bias: q, k, v and o matrices have a bias.
        mlp_bias: gate, up and down matrices have a bias.
        hidden_act: "silu", the only supported activation.
        torch_dtype: dtype of the weights in the config (float32 without a declared dtype).
        bos_token_id: begin-of-text token, if any.
        eos_token_ids: tokens that end a text, from generation_config.json, config.json and, for a
            folder, the tokenizer.
        sliding_window: tokens of the attention window in training; None for full attention.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str
    torch_dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    sliding_window: int | None = None

    @classmethod
    def from_folder(cls, path: Path | str) -> Self:
        """Read config.json, generation_config.json and the tokenizer's end token.

        Raises:
            CheckpointError: missing or malformed file, or an unsupported model.
        """
        folder = Path(path)
        file = folder / "config.json"
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: is a PEFT adapter, not a model; adapters are not supported: "
                "merge the adapter into the base model and save the result"
            )
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing; give a model folder with a config.json")
        generation_file = folder / "generation_config.json"
        generation = None
        if generation_file.is_file():
            generation = read_json_object(generation_file, _MAX_CONFIG_BYTES)
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
    ) -> Self:
        """A model config from the objects of config.json and generation_config.json.

        Args:
            settings: object of config.json, in the spelling of transformers 4 or 5.
            generation: object of generation_config.json, or None without that file.
            source: file name for errors.

        Raises:
            CheckpointError: a missing or malformed field, or an unsupported model.
        """
        read = Fields(settings, source)
        architecture = _architecture(read)
        _refuse_uncomputed(read)
        return cls.from_fields(read, generation, architecture)

    @classmethod
    def from_fields(
        cls, read: Fields, generation: Mapping[str, Any] | None, architecture: str
    ) -> Self:
        """A model config of an architecture with Llama's fields, settings checked or not.

        Args:
            read: fields of config.json, without a setting that changes the computation.
            generation: object of generation_config.json, or None without that file.
            architecture: an architecture of the caller's family.

        Raises:
            CheckpointError: a missing or malformed field.
        """
        vocab_size = read.size("vocab_size")
        hidden_size = read.size("hidden_size")
        num_heads, num_kv_heads = read_heads(read)
        if read.get("head_dim") is None and hidden_size % num_heads:
            raise read.wrong(
                "num_attention_heads", num_heads, f"a divisor of `hidden_size`={hidden_size}"
            )
        head_dim = read.size("head_dim", hidden_size // num_heads, _MAX_HEAD_DIM)
        if head_dim % 2:
            raise read.wrong("head_dim", head_dim, "an even number")
        max_position_embeddings = read.size("max_position_embeddings", 2048)
        more = Fields(
            generation or {}, read.source.replace("config.json", "generation_config.json")
        )
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=read.size("intermediate_size"),
            num_layers=read.size("num_hidden_layers", most=_MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6, low=0.0),
            rope=read_rope(read, max_position_embeddings),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            attention_bias=read.flag("attention_bias"),
            mlp_bias=read.flag("mlp_bias"),
            hidden_act=read_activation(read),
            torch_dtype=read_torch_dtype(read),
            bos_token_id=next(iter(read.tokens("bos_token_id", vocab_size)), None),
            eos_token_ids=end_tokens(more, read, vocab_size),
            sliding_window=_sliding_window(read),
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

    def num_parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        attention = 2 * hidden * (self.q_size + self.kv_size)
        if self.attention_bias:
            attention += self.q_size + 2 * self.kv_size + hidden
        layer = attention + 3 * hidden * mlp + 2 * hidden
        if self.mlp_bias:
            layer += 2 * mlp + hidden
        vocabularies = 1 if self.tie_word_embeddings else 2
        return vocabularies * self.vocab_size * hidden + self.num_layers * layer + hidden


def read_heads(read: Fields) -> tuple[int, int]:
    """Numbers of query heads and of key/value heads.

    Raises:
        CheckpointError: the second does not divide the first.
    """
    num_heads = read.size("num_attention_heads")
    num_kv_heads = read.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise read.wrong(
            "num_key_value_heads",
            num_kv_heads,
            f"a divisor of `num_attention_heads`={num_heads}",
        )
    return num_heads, num_kv_heads


def end_tokens(generation: Fields, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """End tokens from generation_config.json, then from config.json.

    Raises:
        CheckpointError: an end token is not an id below `vocab_size`.
    """
    each = [file.tokens("eos_token_id", vocab_size) for file in (generation, config)]
    return tuple(dict.fromkeys(each[0] + each[1]))


def _architecture(read: Fields) -> str:
    names = read.get("architectures")
    if names is None and read.get("model_type") == "llama":
        return "LlamaForCausalLM"
    architecture = names[0] if isinstance(names, list) and len(names) == 1 else names
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise CheckpointError(
            f"{read.source}: architecture {str(architecture)[:200]!r} is not supported; supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return cast(str, architecture)


def _refuse_uncomputed(read: Fields) -> None:
    """Refuse settings that change the computation of a "Llama" in an unsupported way."""
    if read.get("architectures") == ["MistralForCausalLM"]:
        # the defaults are Mistral 7B's, not Llama's
        for name in ("num_key_value_heads", "sliding_window"):
            if name not in read.values:
                raise CheckpointError(
                    f"{read.source}: `{name}` is missing, but a Mistral config requires this "
                    "field; add it (`sliding_window` may be null)"
                )
    chunk = read.get("attention_chunk_size")
    if chunk is not None:
        raise read.wrong(
            "attention_chunk_size",
            chunk,
            "null: chunked attention is not supported for this family",
        )
    for name in ("use_qk_norm", "qk_norm"):
        if read.get(name):
            raise read.wrong(
                name, read.get(name), "false: the norm of q and k is not supported for this family"
            )


def _sliding_window(read: Fields) -> int | None:
    """The window of all layers, or None; refuses a mix of layers with and without window."""
    used = read.get("use_sliding_window") is None or read.flag("use_sliding_window")
    window = read.size("sliding_window") if read.get("sliding_window") is not None else None
    window = window if used else None
    kind = "full_attention" if window is None else "sliding_attention"
    layer_types = read.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(layer_type != kind for layer_type in layer_types)
    ):
        raise read.wrong(
            "layer_types", layer_types, f"{kind} for all layers: mixed layers are not supported"
        )
    if window is not None and layer_types is None and read.optional_size("max_window_layers"):
        raise read.wrong(
            "max_window_layers",
            read.get("max_window_layers"),
            "0 with `sliding_window`: a mix of layers with and without window is not supported",
        )
    return window


_ROPES = "default, linear, dynamic, llama3 or yarn"


def read_rope(read: Fields, max_position_embeddings: int) -> RopeConfig:
    """RoPE from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""
    settings = read.get("rope_scaling") or read.get("rope_parameters") or {}
    flat = isinstance(settings, Mapping) and not any(
        isinstance(value, Mapping) for value in settings.values()
    )
    if not flat:
        raise read.wrong("rope_scaling", settings, "one flat object for all layers")
    rope = Fields(settings, read.source)
    for fields in (rope, read):
        if fields.number("partial_rotary_factor", 1.0, low=0.0) != 1.0:
            raise fields.wrong("partial_rotary_factor", fields.get("partial_rotary_factor"), "1")
    theta = rope.number("rope_theta", read.number("rope_theta", 10000.0, low=1.0), low=1.0)
    kind = rope.get("rope_type")
    if kind is None:
        kind = rope.get("type")
    if kind == "dynamic":  # no effect up to `max_position_embeddings`, the limit here
        rope.number("factor", None, low=1)
        kind = "default"
    if kind is None or kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=rope.number("factor", None, low=1))
    if kind == "yarn":
        return _read_yarn(read, rope, theta, max_position_embeddings)
    if kind != "llama3":
        raise rope.wrong("rope_type", kind, _ROPES)
    low = rope.number("low_freq_factor", None, low=1e-6)
    return RopeConfig(
        theta=theta,
        scaling="llama3",
        factor=rope.number("factor", None, low=1),
        low=low,
        high=rope.number("high_freq_factor", None, low=low),
        original_max=read.size(
            "original_max_position_embeddings",
            rope.size("original_max_position_embeddings", max_position_embeddings),
        ),
    )


def _read_yarn(read: Fields, rope: Fields, theta: float, max_positions: int) -> RopeConfig:
    """YaRN settings; a missing field gets the default of transformers."""
    original = rope.size(
        "original_max_position_embeddings",
        read.size("original_max_position_embeddings", max_positions),
    )
    factor = rope.number("factor", max_positions / original, low=1)
    scale, all_dims = (rope.optional_number(name) for name in ("mscale", "mscale_all_dim"))
    usual = yarn_attention_factor(factor, scale, all_dims)
    if rope.get("truncate") is not None and not rope.flag("truncate"):
        raise rope.wrong("truncate", False, "true: no other rule is supported")
    if theta <= 1:
        raise rope.wrong("rope_theta", theta, "a number above 1")
    return RopeConfig(
        theta=theta,
        scaling="yarn",
        factor=factor,
        low=rope.number("beta_slow", 1.0, low=1e-6),
        high=rope.number("beta_fast", 32.0, low=1e-6),
        original_max=original,
        attention_factor=rope.number("attention_factor", usual, low=1e-6),
    )


def read_activation(read: Fields) -> str:
    """Activation of the MLP: "silu", also named "swish"."""
    read.one_of("hidden_act", ("silu", "swish"), "silu")
    return "silu"


def read_torch_dtype(read: Fields) -> str:
    """Declared dtype of the weights."""
    name = "torch_dtype" if read.get("torch_dtype") is not None else "dtype"
    value = read.get(name)
    if isinstance(value, str) and value.startswith("torch."):
        read = Fields({name: value.removeprefix("torch.")}, read.source)
    return read.one_of(name, TORCH_DTYPES, "float32")
