"""Finds the end of a bracketed text in a single pass while the text arrives in pieces."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_CLOSE = frozenset(_CLOSING.values())
_MARK_STARTS = frozenset("<`")


def prefix(text: str, at: int, words: Collection[str]) -> bool | None:
    """Whether `text` has one of `words` at `at`; None while more text may decide."""
    possible = False
    for word in words:
        if text.startswith(word, at):
            return True
        possible = possible or (len(text) - at < len(word) and word.startswith(text[at:]))
    return None if possible else False


class Balance:
    """Counts brackets outside of strings; reads each character once.

    Args:
        quotes: characters that open a string: `"` in JSON, `"` and `'` in Python.
        triple: three quotes open a string that only three quotes close, as in Python.
        marks: marks that end the text outside of strings, even with open brackets.

    Attributes:
        mark_at: position of the first mark; None before.
    """

    __slots__ = ("_at", "_closing", "_marks", "_missing", "_quotes", "_triple", "mark_at")

    def __init__(self, quotes: str, *, triple: bool = False, marks: Sequence[str] = ()) -> None:
        self._marks = marks
        self.mark_at: int | None = None
        self._quotes = quotes
        self._triple = triple
        self._at = 0
        self._missing: list[str] = []  # closing brackets of the open brackets, outermost first
        self._closing = ""  # closing quotes of the open string

    def end(self, text: str, *, final: bool = False) -> int | None:
        """Position after the bracket that closes the first bracket of `text`; None before.

        Args:
            text: the whole text so far; each call passes a longer text. The text starts with the
                bracket, or with a name before the bracket.
            final: no text follows, so that a quote is not the first of three.
        """
        at, size = self._at, len(text)
        while at < size and self.mark_at is None:
            char = text[at]
            if self._closing:
                if char == "\\":
                    if at + 1 >= size:
                        break
                    at += 2
                    continue
                if char == self._closing[0]:
                    if not text.startswith(self._closing, at):
                        if size - at < len(self._closing) and not final:
                            break
                        at += 1
                        continue
                    at += len(self._closing)
                    self._closing = ""
                    continue
            elif char in self._quotes:
                if self._triple and size - at < 3 and not final:
                    if text[at:] == char * (size - at):
                        break
                triple = self._triple and text.startswith(char * 3, at)
                self._closing = char * 3 if triple else char
                at += len(self._closing)
                continue
            elif char in _MARK_STARTS:
                is_mark = prefix(text, at, self._marks)
                if is_mark:
                    self.mark_at = at
                if is_mark or (is_mark is None and not final):
                    break
            elif char in _CLOSING:
                self._missing.append(_CLOSING[char])
            elif char in _CLOSE:
                if self._missing:
                    self._missing.pop()
                if not self._missing:
                    self._at = at
                    return at + 1
            at += 1
        self._at = at
        return None

    @property
    def missing(self) -> str | None:
        """The brackets that close the text so far; None within a string."""
        return None if self._closing else "".join(reversed(self._missing))
