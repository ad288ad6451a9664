"""Drafts that came with the result of the last step, from a model on the slices.

Knows tokens; knows nothing of models.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

_STRENGTH = 8
"""Strength of a model's draft, between a chance match and a long copy."""


class ModelProposer:
    """Proposes what the slices drafted after the last known token.

    Args:
        tokens: known tokens of the sequence; the owner appends tokens.
    """

    def __init__(self, tokens: array[int]) -> None:
        self._tokens = tokens
        self._draft: list[int] = []
        self._known = 0
        self.matched = _STRENGTH

    @property
    def next(self) -> int:
        """The first drafted token; -1 without a draft for the known tokens."""
        return self._draft[0] if self._draft and self._known == len(self._tokens) else -1

    def take(self, draft: Iterable[int]) -> None:
        """Keep the draft that follows the tokens known now."""
        self._draft, self._known = [token for token in draft if token >= 0], len(self._tokens)

    def extend(self) -> None:
        """Do nothing: a draft for fewer tokens is void."""

    def propose(self, most: int) -> list[int]:
        """The draft, if it follows the known tokens."""
        return self._draft[:most] if self.next >= 0 else []
