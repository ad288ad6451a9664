"""Where the last tokens of a text occurred before: an index of n-grams over a growing text.

Old text is indexed in sorted arrays, at most 48 bytes a token; new text in dictionaries, until
these are large enough to be merged. So a token costs a few dictionary operations, and a long prompt
one sort for each length.

Knows token ids; knows nothing of sequences.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

import numpy as np
import numpy.typing as npt

SHORT, LONG = 3, 6
LENGTHS = (LONG, SHORT, 2, 1)
"""Lengths of the indexed n-grams, from the most telling."""
END_OF_TEXT = 2**21 - 1
"""Separates texts: larger than every token id, and never proposed."""
_SHIFT = 21
_MIX = 0x9E3779B97F4A7C15
_MASK = 2**63 - 1
_MERGE = 2048
"""Least number of new n-grams that are merged into the sorted arrays."""
_LONGEST = 32
"""Longest match that is counted."""

Keys = npt.NDArray[np.uint64]


class TokenIndex:
    """N-grams of a text and the position after their last occurrence.

    Args:
        tokens: the text; the owner may append tokens, never change them.

    Attributes:
        tokens: the text.
        size: number of tokens that are indexed.
    """

    def __init__(self, tokens: array[int]) -> None:
        self.tokens = tokens
        self.size = 0
        self._old = {length: _Sorted() for length in LENGTHS}
        self._new: dict[int, dict[int, int]] = {length: {} for length in LENGTHS}

    def extend(self, end: int | None = None) -> None:
        """Index the n-grams that end at or before `end`, or all."""
        end = len(self.tokens) if end is None else end
        if end - self.size > _MERGE:
            self._merge(end)
            return
        tokens = self.tokens
        single, pair, short, long = (self._new[length] for length in (1, 2, SHORT, LONG))
        for position in range(self.size + 1, end + 1):
            single[tokens[position - 1]] = position
            if position >= 2:
                pair[(tokens[position - 2] << _SHIFT) | tokens[position - 1]] = position
            if position >= SHORT:
                key = _key(tokens, position)
                short[key] = position
                if position >= LONG:
                    before = _key(tokens, position - SHORT)
                    long[(before * _MIX + key) & _MASK] = position
        self.size = end
        if len(short) > max(_MERGE, self._old[SHORT].size // 4):
            self._merge(end)

    def _merge(self, end: int) -> None:
        for new in self._new.values():
            new.clear()
        text = np.frombuffer(self.tokens, dtype=np.int32, count=end).astype(np.uint64)
        pair = (text[:-1] << np.uint64(_SHIFT)) | text[1:]
        short = (text[:-2] << np.uint64(2 * _SHIFT)) | pair[1:]
        long = short[:-SHORT] * np.uint64(_MIX) + short[SHORT:]
        keys = {1: text, 2: pair, SHORT: short, LONG: long & np.uint64(_MASK)}
        for length, each in keys.items():
            self._old[length].set(each, length)
        self.size = end

    def find(self, text: array[int]) -> tuple[int, int]:
        """Where the last tokens of `text` occurred: the position after them, and the match length.

        A match of six tokens goes before one of three, two or one, and a later match before an
        earlier one. (-1, 0) without a match. In this index's own text the last tokens must not be
        indexed yet.
        """
        count = len(text)
        for length in LENGTHS:
            if count < length:
                continue
            position = self._lookup(length, _key_of(text, count, length))
            # the key of a long n-gram is a hash
            if position >= 0 and self.tokens[position - length : position] == text[-length:]:
                return position, self._matched(text, position, length)
        return -1, 0

    def _lookup(self, length: int, key: int) -> int:
        position = self._new[length].get(key, -1)
        return position if position >= 0 else self._old[length].find(key)

    def _matched(self, text: array[int], position: int, known: int) -> int:
        """Number of tokens before `position` that equal the last ones of `text`."""
        count, matched = len(text), known
        most = min(_LONGEST, position, count)
        while matched < most and self.tokens[position - 1 - matched] == text[count - 1 - matched]:
            matched += 1
        return matched


class _Sorted:
    """Keys in order, and the position of each."""

    def __init__(self) -> None:
        self._keys = array("Q")
        self._positions = array("i")

    @property
    def size(self) -> int:
        return len(self._keys)

    def set(self, keys: Keys, length: int) -> None:
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        order = order[np.append(ordered[1:] != ordered[:-1], True)]  # the last of equal keys
        self._keys = array("Q", keys[order].tobytes())
        self._positions = array("i", (order + length).astype(np.int32).tobytes())

    def find(self, key: int) -> int:
        at = bisect_right(self._keys, key) - 1
        return self._positions[at] if at >= 0 and self._keys[at] == key else -1


def _key(tokens: array[int], end: int) -> int:
    """The three tokens before `end` as one number."""
    return (tokens[end - 3] << (2 * _SHIFT)) | (tokens[end - 2] << _SHIFT) | tokens[end - 1]


def _key_of(tokens: array[int], end: int, length: int) -> int:
    """The key of the `length` tokens before `end`."""
    if length == LONG:
        return (_key(tokens, end - SHORT) * _MIX + _key(tokens, end)) & _MASK
    if length == SHORT:
        return _key(tokens, end)
    return (tokens[end - 2] << _SHIFT) | tokens[end - 1] if length == 2 else tokens[end - 1]
