"""Where a call begins in a text: what can be said of a place from the characters there are.

Answers from as few characters as the form needs, since text is held back until the answer is
certain. Knows the marks of `forms` and how each form begins; knows nothing of streams.
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
"""Tools that Llama 3.1 was trained to call by `.call(…)`."""

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[^\W\d][\w.]*")
_LABEL = re.compile(r"[\w-]*")
_KEYS = tuple(f'"{key}"' for key in json_calls.KEYS)

_WRAPS = {first: [w for w in WRAPS if w.opening[0] == first] for first in "<[f`"}
_HEADS = {first: [h for h in HEADS if h.opening[0] == first] for first in "<["}

Parse = Callable[[str], list[ToolCall]]


@dataclass(frozen=True, slots=True)
class Start:
    """A call's beginning.

    Attributes:
        parse: reads the call's own text, from `body` to its bracket's end; ValueError when it is
            no call. None where `body` is the beginning of another form.
        body: where that text begins.
        python: strings in it are Python's, else JSON's.
        closing: the mark that may follow it; "" for none.
        sure: it is a call whatever its name.
        named: the name is before the body.
    """

    parse: Parse | None
    body: int
    python: bool = False
    closing: str = ""
    sure: bool = False
    named: bool = False


Answer = Start | bool | None
"""A call begins; it does not (False); or that depends on more text (None)."""


class Beginning:
    """Tells where calls of some tools begin.

    Args:
        tools: names of the tools on offer; None takes any name.
    """

    def __init__(self, tools: frozenset[str] | None) -> None:
        self._tools = tools
        names = BUILTIN if tools is None else tools
        self._builtin_calls = tuple(f"{name}.call(" for name in names)

    def look(self, text: str, at: int, starts_line: bool) -> Answer:
        """Whether a call begins at `at`."""
        char = text[at]
        answer: Answer = False
        for wrap in _WRAPS.get(char, ()):
            if starts_line or not wrap.line_start:
                answer = _better(answer, self._wrapped(text, at, wrap))
        for head in _HEADS.get(char, ()):
            answer = _better(answer, _headed(text, at, head))
        if isinstance(answer, Start):
            return answer
        if char in "{[":
            return _better(answer, self._bracketed(text, at, sure=False))
        if starts_line:
            found = prefix(text, at, self._builtin_calls)
            return _better(answer, replace(_single(at), sure=True) if found else found)
        return answer

    def tagged(self, text: str, at: int) -> Answer:
        """The same behind one of Llama's own tags, where what is no call is code."""
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
            assert label is not None, "matches the empty string"
            body = label.end()
        body = skip(text, body)
        if body == len(text):
            return None
        inner = self._bracketed(text, body, sure=wrap.sure)
        if inner is False and text[body] == "<":
            for head in HEADS:
                inner = _better(inner, _headed(text, body, head))
            if isinstance(inner, Start):
                return Start(None, body, closing=wrap.closing)
        if not isinstance(inner, Start):
            return inner
        return Start(inner.parse, body, inner.python, wrap.closing, wrap.sure)

    def _bracketed(self, text: str, at: int, *, sure: bool) -> Answer:
        """A JSON object, a list of such, a Python list; and a Python call where that is sure."""
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
        found = prefix(text, key, _KEYS)
        return start if found else found

    def _python(self, text: str, at: int, start: Start, *, sure: bool) -> Answer:
        """Whether a tool's name and a bracket stand at `at`."""
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
    found = head.pattern.match(text, at)
    assert found is not None, "the opening is there"
    if found.end() == len(text):
        return None
    if not found[1] or text[found.end()] != "{":
        return False
    parse = partial(_parse_arguments, found[1])
    return Start(parse, found.end(), closing=head.closing, sure=True, named=True)


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


def _better(one: Answer, other: Answer) -> Answer:
    """The answer of two forms: a call in either, or else that more text may decide."""
    if isinstance(one, Start) or other is False:
        return one
    return other if isinstance(other, Start) or one is False else None


def skip(text: str, at: int) -> int:
    """The next place at or after `at` that is no space."""
    found = _SPACE.match(text, at)
    assert found is not None, "matches the empty string"
    return found.end()
