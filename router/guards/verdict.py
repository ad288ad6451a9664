"""A guard's verdict: the answer's words, and the probability of `unsafe`.

Knows texts and log-probabilities; knows nothing of prompts and policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.errors import Unavailable

SAFE, UNSAFE = "safe", "unsafe"
MAX_TOKENS = 64
"""Output tokens of a verdict: `unsafe`, a line break and the codes of all categories."""


class GuardLost(Unavailable):
    """There is no verdict: the guard is gone, slow, or gave no clear answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A guard's judgement.

    Attributes:
        flagged: the content is unsafe.
        categories: codes of the violated categories, as the guard gave them.
        score: probability of the word `unsafe` at the verdict's position, 0 to 1.
    """

    flagged: bool
    categories: tuple[str, ...] = ()
    score: float = 0.0


def read_verdict(answer: str, score: float, codes: Iterable[str]) -> Verdict:
    """The verdict in a guard's answer.

    A verdict that names only categories outside `codes` (an old guard may name one that was left
    out of the prompt) counts as safe.

    Args:
        answer: text of the guard.
        score: probability of `unsafe`.
        codes: codes of the categories in the prompt.

    Raises:
        GuardLost: the first line is neither `safe` nor `unsafe`.
    """
    first, _, rest = answer.strip().partition("\n")
    word = first.strip().lower()
    if word == SAFE:
        return Verdict(flagged=False, score=score)
    if word != UNSAFE:
        raise GuardLost(f"the guard answered {answer[:64]!r}, neither `safe` nor `unsafe`")
    line = rest.strip().partition("\n")[0]
    named = tuple(dict.fromkeys(code.strip() for code in line.split(",") if code.strip()))
    known = frozenset(codes)
    wanted = tuple(code for code in named if code in known)
    if named and not wanted:
        return Verdict(flagged=False, score=score)
    return Verdict(flagged=True, categories=wanted, score=score)


def unsafe_score(rows: Sequence[pb.PositionLogprobs], text_of: Callable[[int], str]) -> float:
    """Probability of `unsafe` at the first position with a visible token.

    A tokenizer may divide the word, so each token that begins `unsafe` counts; no such token begins
    `safe`. A guard writes line breaks before the verdict.

    Args:
        rows: log-probabilities of the answer's tokens with the likeliest alternatives.
        text_of: text of a token.
    """
    for row in rows:
        if not text_of(row.chosen.token_id).strip():
            continue
        likely = {entry.token_id: entry.logprob for entry in (*row.top, row.chosen)}
        words = ((text_of(token).strip(), value) for token, value in likely.items())
        chances = [math.exp(value) for word, value in words if word and UNSAFE.startswith(word)]
        return min(1.0, sum(chances))
    return 0.0
