"""Windows of a long text for a classifier with a short context, and the score of the whole.

Prompt Guard 2 reads 512 tokens; longer texts are split. Windows overlap, so that an attack on a
border lies whole in a window. Knows token ids and scores; knows nothing of classifiers.
"""

from __future__ import annotations

from collections.abc import Sequence


def split_windows(tokens: Sequence[int], *, size: int = 510, overlap: int = 64) -> list[list[int]]:
    """The tokens in windows that overlap; every token is in one, however long the text is.

    Args:
        tokens: token ids without special tokens.
        size: most tokens of a window: the classifier's context without its special tokens.
        overlap: tokens that neighbours share; below `size`.

    Returns:
        At least one window; a window of an empty text is empty.
    """
    assert 0 <= overlap < size, "windows overlap in part"
    last = max(0, len(tokens) - size)
    starts = [*range(0, last, size - overlap), last]
    return [list(tokens[start : start + size]) for start in starts]


def whole_score(scores: Sequence[float]) -> float:
    """The score of a text from the scores of its windows: the highest."""
    return max(scores, default=0.0)
