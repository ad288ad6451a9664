"""Whether a call begins at a position of a text, as far as the characters so far tell.

Answers after as few characters as the form needs, since text is held back until the answer is
certain. Knows the marks of `forms` and the beginning of each form; knows nothing of streams.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from arriero.router.tools import json_calls, pythonic
from arriero.router.tools.balance import prefix
from arriero.router.tools.events import ToolCall
from arriero.router.tools.forms import HEADS, WRAPS, Head, Wrap

BUILTIN = ("brave_search", "wolfram_alpha")
"""Tools that Llama 3.1 learned to call by `.call(…)`."""

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[^\W\d][\w.]*")
_LABEL = re.compile(r"[\w-]*")
_KEYS = tuple(f'"{key}"' for key in json_calls.KEYS)

_WRAPS = {first: [w for w in WRAPS if w.opening[0] == first] for first in "<[f`"}
_HEADS = {first: [h for h in HEADS if h.opening[0] == first] for first in "<["}

Parse = Callable[[str], list[ToolCall]]


@dataclass(frozen=True, slots=True)
class Start:
    """The beginning of a call.

    Attributes:
        parse: reads the text of the call, from `body` to the closing bracket; raises ValueError for
            text that is no call. None when another form begins at `body`.
        body: position of the text of the call.
        python: strings are Python's; otherwise JSON's.
        closing: mark that may follow the call; "" for none.
        sure: the text is a call whatever the name.
        named: the name is before the body.
    """

    parse: Parse | None
    body: int
    python: bool = False
    closing: str = ""
    sure: bool = False
    named: bool = False


Answer = Start | bool | None
"""A call begins (`Start`), no call begins (False), or more text must decide (None)."""


class Beginning:
    """Tells where calls of tools begin.

    Args:
        tools: names of the offered tools; None accepts all names.
    """

    def __init__(self, tools: frozenset[str] | None) -> None:
        self._tools = tools
        names = BUILTIN if tools is None else tools
        self._builtin_calls = tuple(f"{name}.call(" for name in names)

    def check(self, text: str, at: int, starts_line: bool) -> Answer:
        """Whether a call begins at `at`, outside of Llama's own tags."""
        char = text[at]
        answer: Answer = False
        for wrap in _WRAPS.get(char, ()):
            if starts_line or not wrap.line_start:
                answer = _combined(answer, self._wrapped(text, at, wrap))
        for head in _HEADS.get(char, ()):
            answer = _combined(answer, _headed(text, at, head))
        if isinstance(answer, Start):
            return answer
        if char in "{[":
            return _combined(answer, self._bracketed(text, at, sure=False))
        if starts_line:
            builtin = prefix(text, at, self._builtin_calls)
            return _combined(answer, replace(_single(at), sure=True) if builtin else builtin)
        return answer

    def check_after_tag(self, text: str, at: int) -> Answer:
        """Whether a call begins at `at`, after one of Llama's own tags; other text is code."""
        char = text[at]
        if char == "{":
            return _object(at)
        if char == "[":
            inner = skip(text, at + 1)
            if inner == len(text):
                return None
            return _list(at) if text[inner] == "{" else _python_list(at)
        name = _NAME.match(text, at)
        if name is None:
            return False
        if name.end() == len(text):
            return None
        known = self._tools is not None and name[0] in self._tools
        fits = text[name.end()] == "(" and (known or name[0].endswith(".call"))
        return _single(at) if fits else False

    def _wrapped(self, text: str, at: int, wrap: Wrap) -> Answer:
        opening = prefix(text, at, (wrap.opening,))
        if not opening:
            return opening
        body = at + len(wrap.opening)
        if wrap.label:
            label = _LABEL.match(text, body)
            assert label is not None, "the pattern matches the empty string"
            body = label.end()
        body = skip(text, body)
        if body == len(text):
            return None
        inner = self._bracketed(text, body, sure=wrap.sure)
        if inner is False and text[body] == "<":
            for head in HEADS:
                inner = _combined(inner, _headed(text, body, head))
            if isinstance(inner, Start):
                return Start(None, body, closing=wrap.closing)
        if not isinstance(inner, Start):
            return inner
        return Start(inner.parse, body, inner.python, wrap.closing, wrap.sure)

    def _bracketed(self, text: str, at: int, *, sure: bool) -> Answer:
        """A JSON object, a list of objects or a Python list; a Python call only with `sure`."""
        char = text[at]
        if char == "{":
            return self._json(text, at, _object(at), sure=sure)
        if char == "[":
            inner = skip(text, at + 1)
            if inner == len(text):
                return None
            if text[inner] == "{":
                return self._json(text, inner, _list(at), sure=sure)
            return self._python(text, inner, _python_list(at), sure=sure)
        return self._python(text, at, _single(at), sure=sure) if sure else False

    def _json(self, text: str, at: int, start: Start, *, sure: bool) -> Answer:
        if sure:
            return start
        key = skip(text, at + 1)
        if key == len(text):
            return None
        is_key = prefix(text, key, _KEYS)
        return start if is_key else is_key

    def _python(self, text: str, at: int, start: Start, *, sure: bool) -> Answer:
        """The start, if the text has a tool's name and an opening bracket at `at`."""
        tools = None if sure else self._tools
        name = _NAME.match(text, at)
        if name is None:
            return False
        if name.end() == len(text):
            known = tools is None or any(tool.startswith(name[0]) for tool in tools)
            return None if known else False
        if tools is not None and name[0] not in tools:
            return False
        after = skip(text, name.end())
        if after == len(text):
            return None
        return start if text[after] == "(" else False


def _headed(text: str, at: int, head: Head) -> Answer:
    opening = prefix(text, at, (head.opening,))
    if not opening:
        return opening
    match = head.pattern.match(text, at)
    assert match is not None, "the pattern matches each text with the opening"
    if match.end() == len(text):
        return None
    if not match[1] or text[match.end()] != "{":
        return False
    parse = partial(_parse_arguments, match[1])
    return Start(parse, match.end(), closing=head.closing, sure=True, named=True)


def _parse_arguments(name: str, text: str) -> list[ToolCall]:
    return [ToolCall.make(name, json_calls.parse_arguments(text))]


def _object(at: int) -> Start:
    return Start(lambda text: [json_calls.parse_object(text)], at)


def _list(at: int) -> Start:
    return Start(json_calls.parse_list, at)


def _python_list(at: int) -> Start:
    return Start(pythonic.parse_list, at, python=True)


def _single(at: int) -> Start:
    return Start(lambda text: [pythonic.parse_call(text)], at, python=True)


def _combined(first: Answer, second: Answer) -> Answer:
    """The answer of two forms together: a call in either form, otherwise None before False."""
    if isinstance(first, Start) or second is False:
        return first
    return second if isinstance(second, Start) or first is False else None


def skip(text: str, at: int) -> int:
    """Position of the first character at or after `at` that is no space."""
    spaces = _SPACE.match(text, at)
    assert spaces is not None, "the pattern matches the empty string"
    return spaces.end()
