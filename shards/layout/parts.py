"""The types of any model's config, and of a rank's part of a model.

Families have configs of their own types; `AnyModel` has what all of them have. Parts are of two
types: with experts, and without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from arriero.shards.layout.dense import SlicePart
from arriero.shards.layout.moe import MoEPart

if TYPE_CHECKING:
    from torch import Tensor

AnyPart = SlicePart | MoEPart


class AnyModel(Protocol):
    """A frozen dataclass with the numbers of a model; see `ModelConfig` for their meaning."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def architecture(self) -> str:
        """One of the architectures of the model's family."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of the head."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

    @property
    def num_heads(self) -> int:
        """Number of query heads."""

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def max_position_embeddings(self) -> int:
        """Number of positions that the model supports."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the embedding."""

    @property
    def torch_dtype(self) -> str:
        """Dtype of the weights in the config."""

    @property
    def bos_token_id(self) -> int | None:
        """Begin-of-text token, if any."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    def inv_freq(self) -> Tensor:
        """Rotary frequencies in radians per position, float32, shape [head_dim / 2]."""

    def num_parameters(self) -> int:
        """Number of weights; a tied head counts once."""

    def __hash__(self) -> int: ...
