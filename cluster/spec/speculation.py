"""The section `speculation` of a model in `arriero.yaml`.

Knows fields, limits and defaults; knows nothing of how tokens are drafted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field, model_validator

from arriero.cluster.spec.fields import Bytes, SpecSection
from arriero.shards.config.speculation import MAX_DRAFT_TOKENS, DraftKind, SpeculationConfig
from arriero.shards.errors import SpecError


class SpeculationSpec(SpecSection):
    """Speculative decoding: tokens are drafted, and drawn by the model several at a time.

    The answer is the same with and without.

    Attributes:
        kind: "off"; "ngram": drafts are copied from the request's own text and its `prediction`;
            "suffix": also from earlier outputs of the tenant; "draft": a smaller model of the same
            vocabulary drafts, on the same slices; "eagle3": an EAGLE-3 head drafts.
        model: folder of the smaller model or of the head, on every node.
        max_tokens: largest number of drafted tokens of a sequence in a step; the number in use
            follows how many are right, and what the batch leaves free.
        corpus: most memory of a group's leader for earlier outputs, for "suffix"; None for 64 MiB.
    """

    kind: DraftKind = "off"
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)] = 16
    corpus: Bytes | None = None

    def config(self) -> SpeculationConfig:
        """Settings for a group."""
        checked = SpeculationConfig.checked(self.kind, self.max_tokens, self.model)
        return checked if self.corpus is None else replace(checked, corpus_bytes=self.corpus)

    @model_validator(mode="after")
    def _check(self) -> SpeculationSpec:
        try:
            self.config()
        except SpecError as error:
            raise ValueError(str(error)) from None
        return self
