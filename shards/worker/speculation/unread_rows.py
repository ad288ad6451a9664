"""Rows of the sequences that a draft network has not computed yet.

A network computes its rows when it drafts. Rows of sequences for which it shall not draft wait and
are computed several at a time, which costs less than one at a time. Knows tokens, features and
positions; knows nothing of networks and of plans.

Shape legend: T tokens, H hidden size of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class UnreadRows:
    """The waiting rows of a sequence.

    The row at position t needs the token at t + shift and, for a network that reads the target,
    the feature at t.

    Attributes:
        shift: see `DraftNetwork.shift`.
        reads_target: see `DraftNetwork.reads_target`.
        start: position of the first waiting row; -1 for a sequence without a step so far.
        tokens: tokens from position `start` + `shift` on.
        features: features from position `start` on, in pieces [T, H].
        drafted: tokens of the last drafts with computed rows, from position `start` on; a row
            stays valid if its token turns out right. Empty for a network that reads the target,
            whose rows of drafts lack the target's features.
    """

    shift: int
    reads_target: bool
    start: int = -1
    tokens: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)

    @property
    def ready(self) -> int:
        """Number of rows that can be computed."""
        known = len(self.tokens)
        return min(known, self._num_features) if self.reads_target else known

    @property
    def _num_features(self) -> int:
        return sum(len(piece) for piece in self.features)

    def add(self, start: int, tokens: Sequence[int], features_TH: Tensor | None) -> None:
        """Add what a step of the target shows.

        Args:
            start: position of the first token; tokens that are known already are skipped.
            tokens: tokens from `start` on, the last drawn one included.
            features_TH: features from `start` on, one fewer than tokens after a draw.
        """
        if self.start < 0 or start > self.start + self.shift + len(self.tokens):
            # the first step, after a cached prefix whose rows the cache has
            self.start, self.tokens, self.features, self.drafted = start, [], [], []
        known = self.start + self.shift + len(self.tokens)
        self.tokens += tokens[max(0, known - start) :]
        self._skip_drafted()
        if features_TH is not None:
            have = self.start + self._num_features
            piece = features_TH[max(0, have - start) :]
            if len(piece):
                self.features.append(piece)

    def _skip_drafted(self) -> None:
        """Drop the rows that drafts computed already, except that of the last token."""
        right = 0
        for token, drafted in zip(self.tokens[:-1], self.drafted, strict=False):
            if token != drafted:
                break
            right += 1
        del self.tokens[:right]
        self.start += right
        self.drafted = []

    def take(self, count: int) -> tuple[list[int], Tensor | None]:
        """Remove the first `count` rows; gives their tokens and features."""
        tokens = self.tokens[:count]
        del self.tokens[:count]
        self.start += count
        if not self.reads_target:
            return tokens, None
        joined_TH = torch.cat(self.features)
        self.features = [joined_TH[count:]] if len(joined_TH) > count else []
        return tokens, joined_TH[:count]

    def own_memory(self) -> None:
        """Copy waiting features, which otherwise keep a whole step's activations alive."""
        self.features = [torch.cat(self.features).clone()] if self.features else []
