"""Python-like calls: `[f(a='x'), g()]` and `f.call(a="x")`.

Reads literals only (strings, numbers, lists, tuples, mappings, true and None in both spellings);
evaluates nothing. More tolerant than Python, because models are less exact: a string may have a
bare line break.
"""

from __future__ import annotations

import re
from typing import Any

from arriero.router.tools.events import ToolCall

MAX_DEPTH = 64
"""Largest depth of nested values."""

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


def parse_list(text: str) -> list[ToolCall]:
    """The calls of `[f(...), g(...)]`, at least one call.

    Raises:
        ValueError: the text is no list of calls.
    """
    reader = _Reader(text)
    reader.take("[")
    calls = []
    while not reader.at("]"):
        calls.append(reader.call())
        if not reader.skip(","):
            break
    reader.take("]")
    reader.finish()
    if not calls:
        raise ValueError("the list has no calls")
    return calls


def parse_call(text: str) -> ToolCall:
    """The call of `f(...)`, or of `f.call(...)`, Llama 3.1's form for built-in tools.

    Raises:
        ValueError: the text is no call.
    """
    reader = _Reader(text)
    call = reader.call()
    reader.finish()
    return ToolCall(call.name.removesuffix(".call"), call.arguments)


def complete_calls(text: str) -> tuple[list[ToolCall], str]:
    """The complete calls of a list that was cut off, and the text after these calls."""
    reader = _Reader(text)
    reader.take("[")
    calls: list[ToolCall] = []
    while True:
        rest = reader.rest()
        try:
            calls.append(reader.call())
        except ValueError:
            return calls, rest
        if not reader.skip(","):
            return calls, reader.rest()


def partial_call(text: str) -> ToolCall | None:
    """The call at the beginning of `text`, with the complete arguments; None without a name."""
    reader = _Reader(text)
    arguments: dict[str, Any] = {}
    try:
        name = reader.name()
        reader.take("(")
    except ValueError:
        return None
    try:
        reader.arguments(arguments)
    except ValueError:
        pass  # the text ends here
    written = ToolCall.make(name.removesuffix(".call"), arguments)
    return ToolCall(written.name, written.arguments[:-1] if arguments else "")


class _Reader:
    """A recursive-descent reader over one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def _space(self) -> None:
        spaces = _SPACE.match(self._text, self._at)
        assert spaces is not None, "the pattern matches the empty string"
        self._at = spaces.end()

    def at(self, mark: str) -> bool:
        """Whether `mark` is next, after spaces."""
        self._space()
        return self._text.startswith(mark, self._at)

    def skip(self, mark: str) -> bool:
        if self.at(mark):
            self._at += len(mark)
            return True
        return False

    def take(self, mark: str) -> None:
        if not self.skip(mark):
            raise ValueError(f"{mark!r} is missing at {self._at}")

    def finish(self) -> None:
        self._space()
        if self._at != len(self._text):
            raise ValueError(f"text follows the call at {self._at}")

    def _match(self, pattern: re.Pattern[str]) -> str:
        self._space()
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError(f"a name or value is missing at {self._at}")
        self._at = match.end()
        return match[0]

    def rest(self) -> str:
        self._space()
        return self._text[self._at :]

    def name(self) -> str:
        return self._match(_NAME)

    def call(self) -> ToolCall:
        name = self.name()
        self.take("(")
        arguments: dict[str, Any] = {}
        self.arguments(arguments)
        return ToolCall.make(name, arguments)

    def arguments(self, arguments: dict[str, Any]) -> None:
        """Read into `arguments` up to the closing bracket; arguments before an error stay."""
        while not self.at(")"):
            key = self._match(_NAME)
            self.take("=")
            if key in arguments:
                raise ValueError(f"the argument {key} occurs twice")
            arguments[key] = self._value(0)
            if not self.skip(","):
                break
        self.take(")")

    def _value(self, depth: int) -> Any:  # noqa: ANN401
        if depth > MAX_DEPTH:
            raise ValueError(f"the value is nested deeper than {MAX_DEPTH} levels")
        if self.skip("["):
            return self._items("]", depth)
        if self.skip("("):
            return self._items(")", depth)
        if self.skip("{"):
            return self._mapping(depth)
        if self.at("'") or self.at('"'):
            return self._string()
        char = self._text[self._at : self._at + 1]
        if char.isdecimal() or char in ("+", "-", "."):
            number = self._match(_NUMBER).replace("_", "")
            return float(number) if any(c in number for c in ".eE") else int(number)
        word = self._match(_NAME)
        if word not in _WORDS:
            raise ValueError(f"{word} is no literal")
        return _WORDS[word]

    def _items(self, closing: str, depth: int) -> list[Any]:
        items = []
        while not self.at(closing):
            items.append(self._value(depth + 1))
            if not self.skip(","):
                break
        self.take(closing)
        return items

    def _mapping(self, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not self.at("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str):
                raise ValueError("a key is no string")
            self.take(":")
            items[key] = self._value(depth + 1)
            if not self.skip(","):
                break
        self.take("}")
        return items

    def _string(self) -> str:
        quote = self._text[self._at]
        mark = quote * 3 if self._text.startswith(quote * 3, self._at) else quote
        start = at = self._at + len(mark)
        while not self._text.startswith(mark, at):
            if at >= len(self._text):
                raise ValueError("a string has no end")
            at += 2 if self._text[at] == "\\" else 1
        self._at = at + len(mark)
        return _ESCAPE.sub(_unescape, self._text[start:at])


def _unescape(escape: re.Match[str]) -> str:
    body = escape[1]
    if body[0] in "uUx" and len(body) > 1:
        return chr(int(body[1:], 16))
    if body[0] in "01234567":
        return chr(int(body, 8))
    if body in ("\\", "'", '"'):
        return body
    if body == "\n":
        return ""
    return _LETTERS.get(body, "\\" + body)
