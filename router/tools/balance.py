"""The end of a bracketed text, found in one pass however it arrives."""

from __future__ import annotations

_OPEN = frozenset("([{")
_CLOSE = frozenset(")]}")


class Balance:
    """Watches brackets outside of strings; each character is looked at once.

    Args:
        quotes: the characters that open a string: `"` in JSON, both in Python.
        triple: three quotes open a string that only three close, as in Python.
    """

    __slots__ = ("_at", "_closing", "_depth", "_quotes", "_triple")

    def __init__(self, quotes: str, *, triple: bool = False) -> None:
        self._quotes = quotes
        self._triple = triple
        self._at = 0
        self._depth = 0
        self._closing = ""  # what ends the string we are in

    def end(self, text: str, *, final: bool = False) -> int | None:
        """Where the first bracket of `text` is closed (one past it), or None so far.

        Args:
            text: all the text, which grows from call to call; it starts with the bracket, or with
                a name before it.
            final: it will not grow, so an open question (is a quote one of three?) is decided.
        """
        at, size = self._at, len(text)
        while at < size:
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
            elif char in _OPEN:
                self._depth += 1
            elif char in _CLOSE:
                self._depth -= 1
                if self._depth <= 0:
                    self._at = at
                    return at + 1
            at += 1
        self._at = at
        return None
