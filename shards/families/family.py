"""What a model family tells layout, checkpoints, engine, planner and commands: one record.

Knows the questions and their default answers; knows nothing of any family. Needs no torch, so that
leaders and planners start fast: the record names the class of its slices, which need torch, by a
string.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:  # the record stands below the rooms that ask it
    from arriero.kernels.attention_mask import AttentionMaskSpec
    from arriero.shards.checkpoint.formats.modules import Module
    from arriero.shards.checkpoint.formats.scheme import QuantScheme
    from arriero.shards.config.group import GroupConfig
    from arriero.shards.config.parallel import ParallelConfig
    from arriero.shards.layout.parts import AnyPart

Model = TypeVar("Model")


class ReadConfig(Protocol):
    """Reads the numbers of a model."""

    def __call__(
        self,
        settings: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        *,
        source: str = "config.json",
    ) -> Any:  # noqa: ANN401
        """A model config from the objects of config.json and generation_config.json.

        Args:
            settings: object of config.json, without `quantization_config`.
            generation: object of generation_config.json, or None without that file.
            source: file name for errors.

        Raises:
            CheckpointError: a missing or malformed field, or a setting that changes the computation
                in an unsupported way.
        """


class VisionSizes(Protocol):
    """Sizes of a vision tower that reads tiles."""

    @property
    def image_size(self) -> int:
        """Side of a tile in pixels."""

    @property
    def features_per_tile(self) -> int:
        """Features of a tile: rows of the text model."""

    @property
    def hidden_size(self) -> int:
        """Width of the tower."""

    @property
    def num_positions(self) -> int:
        """Rows of a tile within the tower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSizes:
    """Routed experts of a layer.

    Attributes:
        num_experts: experts of a layer.
        top_k: experts for each token.
    """

    num_experts: int
    top_k: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Release:
    """The form of a family's published FP8 checkpoints, for plans without a checkpoint.

    Attributes:
        scheme: the form of a model.
        exists: whether an FP8 checkpoint of a model was published.
    """

    scheme: Callable[[Any], QuantScheme]
    exists: Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSplit:
    """Split of a text before byte-level BPE.

    Attributes:
        pattern: regular expression of a piece, as the `tokenizers` package reads it.
        normalizes: whether the text is brought to Unicode's form NFC before.
    """

    pattern: str
    normalizes: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFamily:
    """How GGUF files store a family.

    Attributes:
        architecture: value of `general.architecture`; also the first word of the metadata keys.
        config: fields of config.json that are the same for all models: architectures, model_type.
        layer_names: names of a layer's modules beside those of all dense models, from GGUF's name
            to Hugging Face's.
        pairs: rows of q and k are stored in interleaved pairs of each head's rotary halves.
        splits: splits of the text by `tokenizer.ggml.pre`, beside the known ones.
    """

    architecture: str
    config: Mapping[str, Any]
    layer_names: Mapping[str, str] = field(default_factory=dict)
    pairs: bool = False
    splits: Mapping[str, TokenSplit] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFamily(Generic[Model]):
    """A model family; `Model` is the type of its configs.

    Attributes:
        name: name for errors.
        architectures: names in the field `architectures` of config.json.
        model_types: names in the field `model_type`, for a config.json without `architectures`.
        read_config: reads a config; the result's `architecture` is one of `architectures`.
        partition: the part of each rank of a group.
        modules: every matrix and vector of a checkpoint; the second argument says whether the
            experts of a layer are fused (plain checkpoints), or separate (quantized ones).
        attention_mask: keys that a token sees in layers without full attention; refuses a window
            that the model cannot have.
        slice: class of a rank's weights and forward pass, as "module:class"; see `ModelSlice`.
        text_prefix: prefix of the text model's tensor names.
        chunked_layers: for each layer, whether attention is chunked; such layers have a pool of
            their own. Empty for a family without chunked attention.
        attention_chunk: tokens of an attention chunk; 0 without chunked attention.
        vision: sizes of the vision tower; None for a model that reads only text.
        image_token: placeholder that image features replace; None without vision.
        experts: sizes of the routed experts; None for a dense model. A model with experts can be
            spread over data-parallel ranks, and its parts are of type `MoEPart`.
        fp8_release: form of published FP8 checkpoints; None where none is known.
        catalog: fields of config.json of published models, by the name that `arriero plan --model`
            accepts.
        gguf: how GGUF files store the family; None if it cannot be imported.
        chat_template: Jinja source of the template for a checkpoint without one, from the texts of
            the tokenizer's special tokens; None for tokens of another model.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    read_config: ReadConfig
    partition: Callable[[Model, ParallelConfig], Sequence[AnyPart]]
    modules: Callable[[Model, bool], Sequence[Module]]
    attention_mask: Callable[[Model, GroupConfig], AttentionMaskSpec]
    slice: str
    text_prefix: Callable[[Model], str] = lambda model: ""
    chunked_layers: Callable[[Model], tuple[bool, ...]] = lambda model: ()
    attention_chunk: Callable[[Model], int] = lambda model: 0
    vision: Callable[[Model], VisionSizes | None] = lambda model: None
    image_token: Callable[[Model], int | None] = lambda model: None
    experts: Callable[[Model], ExpertSizes | None] = lambda model: None
    fp8_release: Fp8Release | None = None
    catalog: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gguf: GgufFamily | None = None
    chat_template: Callable[[Collection[str]], str | None] = lambda specials: None
