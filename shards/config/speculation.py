"""Settings of speculative decoding of a group.

Knows names and numbers; knows nothing of how tokens are drafted or verified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from arriero.shards.errors import SpecError

DraftKind = Literal["off", "ngram", "suffix", "draft", "eagle3"]
MAX_DRAFT_TOKENS = 64
"""Largest `max_tokens`: a row of more positions costs more than it can save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationConfig:
    """How tokens are drafted; verification makes the output independent of these settings.

    Attributes:
        kind: "off"; "ngram": earlier text of the same sequence; "suffix": also earlier outputs of
            the same tenant; "draft": a smaller model on the same slices; "eagle3": a head that
            reads activations of the model.
        max_tokens: most drafted tokens of a sequence in a step.
        model_path: checkpoint folder of "draft" and "eagle3"; None for the other kinds.
        corpus_bytes: most bytes of earlier outputs of all tenants, for "suffix".
        tap_ids: whether explicit tap ids of an EAGLE-3 head count the layers whose input the head
            reads ("entering") or whose output ("leaving"); None for the meaning of its layout.
    """

    kind: DraftKind = "off"
    max_tokens: int = 16
    model_path: str | None = None
    corpus_bytes: int = 64 << 20
    tap_ids: Literal["entering", "leaving"] | None = None

    @classmethod
    def checked(
        cls, kind: str, max_tokens: int = 16, model_path: str | None = None
    ) -> SpeculationConfig:
        """Settings from a user's words.

        Raises:
            SpecError: the kind is unknown, the number out of range, or a path missing or too much.
        """
        kinds = get_args(DraftKind)
        if kind not in kinds:
            raise SpecError(f"speculation's kind {kind!r} is none of {', '.join(kinds)}")
        if not 1 <= max_tokens <= MAX_DRAFT_TOKENS:
            raise SpecError(
                f"speculation's `max_tokens`={max_tokens} must be 1 to {MAX_DRAFT_TOKENS}"
            )
        config = cls(kind=cast(DraftKind, kind), max_tokens=max_tokens, model_path=model_path)
        if config.in_slices and model_path is None:
            raise SpecError(
                f"speculation of kind {kind!r} needs a model; give the folder of a smaller model "
                "or of an EAGLE-3 head"
            )
        if model_path is not None and not config.in_slices:
            raise SpecError(
                f"speculation of kind {kind!r} reads no model; leave {model_path!r} out, or choose "
                "draft or eagle3"
            )
        return config

    @property
    def enabled(self) -> bool:
        """Whether tokens are drafted at all."""
        return self.kind != "off"

    @property
    def in_slices(self) -> bool:
        """Whether the slices draft, with a model of their own."""
        return self.kind in ("draft", "eagle3")
