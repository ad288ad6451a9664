"""The end of a bracketed text, found in one pass however it arrives."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_CLOSE = frozenset(_CLOSING.values())
_MARK_STARTS = frozenset("<`")


def prefix(text: str, at: int, words: Collection[str]) -> bool | None:
    """Whether one of `words` stands at `at`; None where one may once there is more."""
    maybe = False
    for word in words:
        if text.startswith(word, at):
            return True
        maybe = maybe or (len(text) - at < len(word) and word.startswith(text[at:]))
    return None if maybe else False


class Balance:
    """Watches brackets outside of strings; each character is looked at once.

    Args:
        quotes: the characters that open a string: `"` in JSON, both in Python.
        triple: three quotes open a string that only three close, as in Python.
        marks: what ends the text outside of strings, closed or not.

    Attributes:
        ended: where one of `marks` stands; None so far.
    """

    __slots__ = ("_at", "_closing", "_marks", "_missing", "_quotes", "_triple", "ended")

    def __init__(self, quotes: str, *, triple: bool = False, marks: Sequence[str] = ()) -> None:
        self._marks = marks
        self.ended: int | None = None
        self._quotes = quotes
        self._triple = triple
        self._at = 0
        self._missing: list[str] = []  # what closes the brackets that are open, the first last
        self._closing = ""  # what ends the string we are in

    def end(self, text: str, *, final: bool = False) -> int | None:
        """Where the first bracket of `text` is closed (one past it), or None so far.

        Args:
            text: all the text, which grows from call to call; it starts with the bracket, or with
                a name before it.
            final: it will not grow, so an open question (is a quote one of three?) is decided.
        """
        at, size = self._at, len(text)
        while at < size and self.ended is None:
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
                found = prefix(text, at, self._marks)
                if found:
                    self.ended = at
                if found or (found is None and not final):
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
        """The brackets that would close the text so far; None within a string."""
        return None if self._closing else "".join(reversed(self._missing))
