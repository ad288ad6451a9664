"""Asks Prompt Guard whether the texts of a request try to take over the model.

Each text is scored on its own, and the worst text counts. Scores are kept for a while: a
conversation comes again with each turn, and only its new texts are computed. Knows texts and
scores; knows nothing of the classifier, which the deployment gives as a function, and of what
follows from a verdict.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol

from arriero.router.guards.verdict import GuardLost, Verdict
from arriero.shards.errors import ArrieroError

PROMPT_GUARD = "prompt-guard"
"""Name of the classifier in metrics."""
CATEGORY = "prompt_injection"
"""The only category of its verdicts."""
MAX_SCORES = 16_384
"""Scores that a gateway keeps; about 3 MB."""


class ScoreTexts(Protocol):
    """Prompt Guard of the deployment."""

    async def __call__(self, texts: Sequence[str], timeout_s: float) -> Sequence[float]:
        """Probability of an injection for each text, 0 to 1.

        Args:
            texts: at least one.
            timeout_s: seconds after which nobody waits for the scores any more.

        Raises:
            Unavailable: the classifier gives no scores.
        """


class InjectionGuard:
    """Gives verdicts on the texts of requests.

    Args:
        score_texts: of the deployment; None where it has no Prompt Guard.
    """

    def __init__(self, score_texts: ScoreTexts | None) -> None:
        self._score_texts = score_texts
        self._scores: OrderedDict[bytes, float] = OrderedDict()

    async def judge(
        self, texts: Sequence[str], *, tenant: str, threshold: float, timeout_s: float
    ) -> Verdict:
        """The verdict on the worst of the texts; without texts the verdict is safe.

        Args:
            texts: of the request.
            tenant: name; a tenant learns nothing of the texts of others from the kept scores.
            threshold: score from which on a text is unsafe.
            timeout_s: seconds after which the judgement counts as lost.

        Raises:
            GuardLost: there are no scores, or not in time.
        """
        keys = {_key(tenant, text): text for text in texts}
        known = {key: self._scores[key] for key in keys if key in self._scores}
        unknown = {key: text for key, text in keys.items() if key not in known}
        if unknown:
            scores = await self._score(tuple(unknown.values()), timeout_s)
            known |= dict(zip(unknown, scores, strict=True))
        self._keep(known)
        worst = max(known.values(), default=0.0)
        flagged = bool(known) and worst >= threshold
        return Verdict(flagged=flagged, categories=(CATEGORY,) if flagged else (), score=worst)

    async def _score(self, texts: Sequence[str], timeout_s: float) -> Sequence[float]:
        if self._score_texts is None:
            raise GuardLost("the deployment has no Prompt Guard; set `gateway.prompt_guard`")
        try:
            scores = await asyncio.wait_for(self._score_texts(texts, timeout_s), timeout_s)
        except TimeoutError:
            raise GuardLost(
                f"Prompt Guard gave no verdict within {timeout_s:g} s; try again later"
            ) from None
        except ArrieroError as error:
            raise GuardLost(f"Prompt Guard: {error}") from error
        if len(scores) != len(texts):
            raise GuardLost(f"Prompt Guard gave {len(scores)} scores for {len(texts)} texts")
        return scores

    def _keep(self, scores: Mapping[bytes, float]) -> None:
        """Keep scores as the latest; the oldest go."""
        for key, score in scores.items():
            self._scores[key] = score
            self._scores.move_to_end(key)
        while len(self._scores) > MAX_SCORES:
            self._scores.popitem(last=False)


def _key(tenant: str, text: str) -> bytes:
    """Names a text of a tenant, without keeping the text."""
    words = f"{tenant}\0{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(words, digest_size=16).digest()
