"""What the engine asks of a source of drafted tokens.

Knows the protocol; knows nothing of sources or of verification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from arriero.shards.engine.sequence import Sequence


class Proposer(Protocol):
    """Proposes the next tokens of a sequence; bad proposals cost time and change no token.

    The proposer reads the sequence's known tokens itself, in `extend`.
    """

    @property
    def matched(self) -> int:
        """Strength of the proposal: last tokens that led to it; 0 without a proposal."""

    @property
    def next(self) -> int:
        """The first proposed token; -1 without a proposal."""

    def extend(self) -> None:
        """Take notice of the tokens that became known since the last call."""

    def propose(self, most: int) -> list[int]:
        """At most `most` tokens that may follow the known tokens; `extend` comes before."""


ProposerFactory = Callable[[Sequence], Proposer | None]
"""Makes the proposer of a sequence; None for a sequence without drafts."""
