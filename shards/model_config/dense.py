"""What a model is, read from a Hugging Face folder's `config.json` and `generation_config.json`.

Knows the dense Llama family's settings and the rotary frequencies that follow from them. It
refuses whatever changes the computation in a way that we do not compute, and knows nothing of
tensors stored, slices or engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object
from arriero.shards.model_config.end_tokens import with_tokenizer_ends
from arriero.shards.model_config.rope import RopeConfig, yarn_attention_factor

if TYPE_CHECKING:  # leaders and gateways read a config without loading torch
    from torch import Tensor

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM")
"""Names under which configs call the dense family: Llama, its spelling of 2023, and Mistral, whose
layers are the same but for the window that its config states."""

TORCH_DTYPES = ("bfloat16", "float16", "float32")

_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 4096  # these two bound what a hostile config makes us list or allocate
_MAX_HEAD_DIM = 65536
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A dense model of the Llama family.

    Attributes:
        architecture: one of `SUPPORTED_ARCHITECTURES`.
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        intermediate_size: columns of the MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides `num_heads`.
        head_dim: width of a head; even.
        rms_norm_eps: added to the mean square.
        rope: rotary embedding.
        max_position_embeddings: positions that the model was made for.
        tie_word_embeddings: the head is the embedding.
        attention_bias: q, k, v and o products carry a bias.
        mlp_bias: gate, up and down products carry a bias.
        hidden_act: "silu", the only one computed.
        torch_dtype: name of the dtype declared for the weights (float32 where nothing is declared).
        bos_token_id: begin-of-text token, if any.
        eos_token_ids: tokens that end a text: generation_config.json's, config.json's and, where
            a folder is read, the tokenizer's.
        sliding_window: tokens of the window that every layer was trained with; None for none.
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
    def from_folder(cls, path: Path | str) -> ModelConfig:
        """Read config.json, generation_config.json and the tokenizer's end token.

        Raises:
            CheckpointError: missing, malformed, or a model that we do not compute.
        """
        folder = Path(path)
        file = folder / "config.json"
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: is a PEFT adapter, not a model; adapters are not served yet: "
                "merge it into its base model and save that"
            )
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; a model folder holds a config.json")
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
    ) -> ModelConfig:
        """Make it from the objects of config.json and generation_config.json.

        Args:
            settings: config.json's object, in the spelling of transformers 4 or 5.
            generation: generation_config.json's object, if there is one.
            source: what an error names.

        Raises:
            CheckpointError: a field missing or malformed, or a model that we do not compute.
        """
        read = Fields(settings, source)
        architecture = _architecture(read)
        _refuse_uncomputed(read)
        vocab_size = read.size("vocab_size")
        hidden_size = read.size("hidden_size")
        num_heads = read.size("num_attention_heads")
        num_kv_heads = read.size("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise read.wrong(
                "num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} query heads"
            )
        if read.get("head_dim") is None and hidden_size % num_heads:
            raise read.wrong("num_attention_heads", num_heads, f"a divisor of {hidden_size}")
        head_dim = read.size("head_dim", hidden_size // num_heads, _MAX_HEAD_DIM)
        if head_dim % 2:
            raise read.wrong("head_dim", head_dim, "an even number")
        max_position_embeddings = read.size("max_position_embeddings", 2048)
        more = Fields(generation or {}, source.replace("config.json", "generation_config.json"))
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
        """Rows of the query product, all heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key product, all heads together; as many for the values."""
        return self.num_kv_heads * self.head_dim

    def inv_freq(self) -> Tensor:
        """Rotary frequencies: radians a position, float32, shape [head_dim / 2]."""
        return self.rope.inv_freq(self.head_dim)

    def num_parameters(self) -> int:
        """Weights stored, a tied head counted once."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        attention = 2 * hidden * (self.q_size + self.kv_size)
        if self.attention_bias:
            attention += self.q_size + 2 * self.kv_size + hidden
        layer = attention + 3 * hidden * mlp + 2 * hidden
        if self.mlp_bias:
            layer += 2 * mlp + hidden
        vocabularies = 1 if self.tie_word_embeddings else 2
        return vocabularies * self.vocab_size * hidden + self.num_layers * layer + hidden


class Fields:
    """One JSON object's fields, each read with its kind checked."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def get(self, name: str) -> Any:  # noqa: ANN401
        """The value, None where the field is missing or null."""
        return self.values.get(name)

    def wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        """The error that says what a field must be."""
        text = repr(value)
        return CheckpointError(f"{self.source}: `{name}`={text[:200]} must be {wanted}")

    def optional_size(self, name: str) -> int | None:
        """A whole number from 0, or None."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some tools write every number as a float
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_SIZE:
            raise self.wrong(name, value, f"a whole number from 0 to {_MAX_SIZE}")
        return value

    def size(self, name: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
        """A whole number from 1."""
        value = self.optional_size(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.source}: `{name}` is missing; add it as a whole number")
        if not 1 <= value <= most:
            raise self.wrong(name, value, f"from 1 to {most}")
        return value

    def optional_number(self, name: str) -> float | None:
        """A finite number, or None."""
        value = self.get(name)
        if value is None:
            return None
        finite = isinstance(value, int | float) and not isinstance(value, bool)
        # the bound keeps huge integers from overflowing float(), and refuses inf and nan
        if not (finite and abs(value) < 1e30):
            raise self.wrong(name, value, "a finite number")
        return float(value)

    def number(self, name: str, default: float | None, *, low: float) -> float:
        """A finite number from `low`."""
        value = self.optional_number(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.source}: `{name}` is missing; add it as a number")
        if value < low:
            raise self.wrong(name, value, f"at least {low:g}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false where the field is missing."""
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool | int) or value not in (0, 1):
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def one_of(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        """One of a few words."""
        value = self.get(name)
        if value is None:
            return default
        if value not in allowed:
            raise self.wrong(name, value, f"one of {', '.join(allowed)}: nothing else is computed")
        return cast(str, value)

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids, given as one or as a list; -1 stands for none, as in old Llama configs."""
        value = self.get(name)
        if value is None:
            return ()
        tokens = []
        for given in value if isinstance(value, list) else [value]:
            token = _token_id(given)
            if token is None:
                raise self.wrong(name, value, "a token id or a list of them")
            if not -1 <= token < vocab_size:
                raise self.wrong(name, value, f"below `vocab_size`={vocab_size}")
            if token >= 0:
                tokens.append(token)
        return tuple(dict.fromkeys(tokens))


def end_tokens(generation: Fields, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """Tokens that generation_config.json and config.json end a text with, the former's first.

    Raises:
        CheckpointError: one is no id below `vocab_size`.
    """
    each = [file.tokens("eos_token_id", vocab_size) for file in (generation, config)]
    return tuple(dict.fromkeys(each[0] + each[1]))


def _token_id(value: object) -> int | None:
    """A whole number, also written as 2.0 or "2"; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _architecture(read: Fields) -> str:
    names = read.get("architectures")
    if names is None and read.get("model_type") == "llama":
        return "LlamaForCausalLM"
    found = names[0] if isinstance(names, list) and len(names) == 1 else names
    if found not in SUPPORTED_ARCHITECTURES:
        raise CheckpointError(
            f"{read.source}: architecture {str(found)[:200]!r} is not supported; supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return cast(str, found)


def _refuse_uncomputed(read: Fields) -> None:
    """Refuse settings under which a "Llama" is another function than the one we compute."""
    if read.get("architectures") == ["MistralForCausalLM"]:
        # their defaults are Mistral 7B's, not a Llama's
        for name in ("num_key_value_heads", "sliding_window"):
            if name not in read.values:
                raise CheckpointError(
                    f"{read.source}: `{name}` is missing, which a Mistral's config must state; "
                    "add it (`sliding_window` may be null)"
                )
    chunk = read.get("attention_chunk_size")
    if chunk is not None:
        raise read.wrong("attention_chunk_size", chunk, "null: it is not computed by this version")
    for name in ("use_qk_norm", "qk_norm"):
        if read.get(name):
            raise read.wrong(name, read.get(name), "false: it is not computed by this version")


def _sliding_window(read: Fields) -> int | None:
    """The window of all layers, if they have one; some with and some without are refused."""
    used = read.get("use_sliding_window") is None or read.flag("use_sliding_window")
    window = read.size("sliding_window") if read.get("sliding_window") is not None else None
    window = window if used else None
    kind = "full_attention" if window is None else "sliding_attention"
    layer_types = read.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(one != kind for one in layer_types)
    ):
        raise read.wrong("layer_types", layer_types, f"{kind} throughout")
    if window is not None and layer_types is None and read.optional_size("max_window_layers"):
        raise read.wrong(
            "max_window_layers",
            read.get("max_window_layers"),
            "0 beside `sliding_window`: layers with and without a window are not computed",
        )
    return window


_ROPES = "default, linear, dynamic, llama3 or yarn: no other is computed"


def read_rope(read: Fields, max_position_embeddings: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4)."""
    found = read.get("rope_scaling") or read.get("rope_parameters") or {}
    if not isinstance(found, Mapping) or any(isinstance(one, Mapping) for one in found.values()):
        raise read.wrong("rope_scaling", found, "one flat object for all layers")
    rope = Fields(found, read.source)
    for fields in (rope, read):
        if fields.number("partial_rotary_factor", 1.0, low=0.0) != 1.0:
            raise fields.wrong("partial_rotary_factor", fields.get("partial_rotary_factor"), "1")
    theta = rope.number("rope_theta", read.number("rope_theta", 10000.0, low=1.0), low=1.0)
    kind = rope.get("rope_type")
    if kind is None:
        kind = rope.get("type")
    if kind == "dynamic":  # changes nothing up to `max_position_embeddings`, the limit here
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
    """YaRN's numbers, with the defaults of transformers where the config says nothing."""
    original = rope.size(
        "original_max_position_embeddings",
        read.size("original_max_position_embeddings", max_positions),
    )
    factor = rope.number("factor", max_positions / original, low=1)
    scale, all_dims = (rope.optional_number(name) for name in ("mscale", "mscale_all_dim"))
    usual = yarn_attention_factor(factor, scale, all_dims)
    if rope.get("truncate") is not None and not rope.flag("truncate"):
        raise rope.wrong("truncate", False, "true: no other rule is computed")
    if theta <= 1:
        raise rope.wrong("rope_theta", theta, "above 1")
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
    """The MLP's activation: "silu", which "swish" is another name of."""
    read.one_of("hidden_act", ("silu", "swish"), "silu")
    return "silu"


def read_torch_dtype(read: Fields) -> str:
    """Name of the dtype declared for the weights."""
    name = "torch_dtype" if read.get("torch_dtype") is not None else "dtype"
    value = read.get(name)
    if isinstance(value, str) and value.startswith("torch."):
        read = Fields({name: value.removeprefix("torch.")}, read.source)
    return read.one_of(name, TORCH_DTYPES, "float32")
