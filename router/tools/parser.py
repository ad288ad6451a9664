"""Calls out of a stream of text, whichever of Llama's forms the model chose.

    <|python_tag|>brave_search.call(query="…")     built-in tools (3.1); also without the tag
    {"name": …, "parameters": {…}}                 JSON (3.1, 4), with or without a tag; lists too
    <function=name>{…}</function>                  custom tools (3.1)
    [f(a='x'), g()]                                pythonic (3.2, 4), with or without tags

Words before, between and after calls are content. A call is given when it is complete, and no part
of it as content; what only looked like a call is given as content as soon as that is certain. How
the text is cut into pieces does not matter. Knows text; the caller must keep special tokens in
it (`skip_special_tokens` off), since some forms begin with one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from arriero.router.tools import json_calls, pythonic
from arriero.router.tools.balance import Balance
from arriero.router.tools.events import Content, Event, ToolCall, Truncated

BUILTIN = ("brave_search", "wolfram_alpha")
"""Tools that Llama 3.1 was trained to call by `.call(…)`."""
CODE = "code_interpreter"
"""The tool that Python code after a tag is for; its one argument is `code`."""

_OPENERS = ("<|python_tag|>", "<|python_start|>")
_ENDERS = ("<|eom_id|>", "<|eot_id|>", "<|eot|>", "<|python_end|>")
_FUNCTION = "<function="
_FUNCTION_END = "</function>"
_MARKS = (*_OPENERS, *_ENDERS, _FUNCTION)

_TRIGGER = re.compile(r"[<{\[\n]")
_GAP = re.compile(r"[\s;,]*")
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[^\W\d][\w.]*")
_WORD = re.compile(r"[\w.]+")
_FUNCTION_HEADER = re.compile(r"<function=\s*([\w.-]*)\s*(?:(>)\s*)?")
_KEYS = tuple(f'"{key}"' for key in json_calls.KEYS)


@dataclass(slots=True)
class _Region:
    """Text that is being gathered as a call, from the start of what is held.

    Attributes:
        parse: reads the whole of it; ValueError when it is no call.
        body: where its first bracket may be (past a tag or a function's name).
        balance: finds the bracket's end; None while it is gathered up to an end mark.
        tagged: a tag went before it, so that what is no call is code.
        closing: what must follow the bracket, such as `</function>`.
    """

    parse: Callable[[str], list[ToolCall]]
    body: int = 0
    balance: Balance | None = None
    tagged: bool = False
    closing: str = ""


class ToolCallParser:
    """Splits one stream of text into content and calls.

    Args:
        tools: names of the tools on offer. Text without a tag is a call only when it names one of
            them; None takes any name.
    """

    def __init__(self, tools: Collection[str] | None = None) -> None:
        self._tools = None if tools is None else frozenset(tools)
        self._held = ""
        self._region: _Region | None = None
        self._after_tag = False
        # Spaces (and separators, after a call) that are dropped if a call follows.
        self._gap: str | None = ""
        self._called = False
        self._line_start = True

    def add(self, text: str, *, final: bool = False) -> list[Event]:
        """What is certain now.

        Args:
            text: the next piece.
            final: nothing follows.
        """
        self._held += text
        events: list[Event] = []
        while self._step(events, final):
            pass
        if final:
            if self._gap and not self._called:
                events.append(Content(self._gap))
            self._gap = None
        return _joined(events)

    def _step(self, events: list[Event], final: bool) -> bool:
        """Take one thing off the start of what is held; False when that must wait."""
        if self._region is not None:
            return self._gather(self._region, events, final)
        if not self._held:
            return False
        if self._after_tag:
            return self._begin_tagged(events, final)
        return self._scan(events, final)

    def _scan(self, events: list[Event], final: bool) -> bool:
        """Content, up to where a call may begin."""
        if self._gap is not None:
            found = (_GAP if self._called else _SPACE).match(self._held)
            assert found is not None, "matches the empty string"
            if found.end():
                self._line_start = self._line_start or "\n" in found[0]
                self._gap += found[0]
                self._held = self._held[found.end() :]
                return bool(self._held)
        at = 0
        while at < len(self._held):
            if self._held[at] == "\n":  # what follows stands at the start of a line
                at += 1
                continue
            starts_line = self._line_start if at == 0 else self._held[at - 1] == "\n"
            verdict = self._begins(at, starts_line)
            if verdict == "yes" or (verdict == "maybe" and not final):
                if at:
                    self._say(events, at)
                elif verdict == "yes":
                    self._begin()
                    return True
                return verdict == "yes"
            after = _TRIGGER.search(self._held, at + 1)
            at = len(self._held) if after is None else after.start()
        self._say(events, len(self._held))
        return False

    def _say(self, events: list[Event], size: int) -> None:
        text, self._held = self._held[:size], self._held[size:]
        self._line_start = text.endswith("\n")
        events.append(Content((self._gap or "") + text))
        self._gap = None

    def _begins(self, at: int, starts_line: bool) -> str:
        """Whether a call begins at `at`: "yes", "no", or "maybe" while that depends on more."""
        held = self._held
        char = held[at]
        if char == "<":
            return _prefix(held, at, _MARKS)
        if char == "{":
            return self._begins_json(at)
        if char == "[":
            inner = _skip(held, at + 1)
            if inner == len(held):
                return "maybe"
            if held[inner] == "{":
                return self._begins_json(inner)
            return self._begins_name(inner, "(")
        if starts_line:
            names = BUILTIN if self._tools is None else self._tools
            return _prefix(held, at, [f"{name}.call(" for name in names])
        return "no"

    def _begins_json(self, at: int) -> str:
        key = _skip(self._held, at + 1)
        return "maybe" if key == len(self._held) else _prefix(self._held, key, _KEYS)

    def _begins_name(self, at: int, then: str) -> str:
        """Whether a tool's name and `then` stand at `at`."""
        name = _NAME.match(self._held, at)
        if name is None:
            return "no"
        if name.end() == len(self._held):
            known = self._tools is None or any(t.startswith(name[0]) for t in self._tools)
            return "maybe" if known else "no"
        if self._tools is not None and name[0] not in self._tools:
            return "no"
        after = _skip(self._held, name.end())
        if after == len(self._held):
            return "maybe"
        return "yes" if self._held.startswith(then, after) else "no"

    def _begin(self) -> None:
        """Open the region that `_begins` saw at the start of what is held."""
        held = self._held
        for mark in _OPENERS:
            if held.startswith(mark):
                self._held = held[len(mark) :]
                self._after_tag = True
                return
        for mark in _ENDERS:
            if held.startswith(mark):
                self._held = held[len(mark) :]
                return
        if held.startswith(_FUNCTION):
            self._region = _Region(_parse_function, len(_FUNCTION), closing=_FUNCTION_END)
        else:
            self._region = self._bracketed(held, 0, tagged=False)

    def _bracketed(self, held: str, at: int, *, tagged: bool) -> _Region:
        quotes = Balance('"')
        python = Balance("\"'", triple=True)
        if held[at] == "{":
            return _Region(lambda text: [json_calls.parse_object(text)], at, quotes, tagged)
        if held[at] != "[":
            return _Region(lambda text: [pythonic.parse_call(text)], at, python, tagged)
        if held[_skip(held, at + 1)] == "{":
            return _Region(json_calls.parse_list, at, quotes, tagged)
        return _Region(pythonic.parse_list, at, python, tagged)

    def _begin_tagged(self, events: list[Event], final: bool) -> bool:
        """After a tag: a call in one of the forms, or else code."""
        held = self._held
        at = _skip(held, 0)
        verdict = "maybe" if at == len(held) else self._after_tag_is(at)
        if verdict == "maybe" and not final:
            return False
        if verdict == "yes":
            self._after_tag = False
            self._region = self._bracketed(held, at, tagged=True)
        elif at < len(held) and _prefix(held, at, _MARKS) == "yes":
            self._after_tag = False
            self._held = held[at:]
        elif at == len(held):
            self._after_tag = False
            self._held = ""
        else:
            self._after_tag = False
            self._region = _Region(_never, tagged=True)
        return True

    def _after_tag_is(self, at: int) -> str:
        held = self._held
        char = held[at]
        if char == "{":
            return "yes"
        if char == "[":
            return "maybe" if _skip(held, at + 1) == len(held) else "yes"
        if char == "<":
            return "maybe" if _prefix(held, at, _MARKS) == "maybe" else "no"
        name = _NAME.match(held, at)
        if name is None:
            return "no"
        if name.end() == len(held):
            return "maybe"
        if held[name.end()] != "(":
            return "no"
        known = self._tools is not None and name[0] in self._tools
        return "yes" if known or name[0].endswith(".call") else "no"

    def _gather(self, region: _Region, events: list[Event], final: bool) -> bool:
        """Go on with a region, until its end or that of the text."""
        if region.parse is _never:
            return self._gather_code(region, events, final)
        if region.balance is None:
            body = _function_body(self._held)
            if body is None:
                if final:
                    self._cut_off(region, events)
                return False
            if body < 0:
                self._region = None
                self._say(events, len(_FUNCTION))
                return True
            region.body, region.balance = body, Balance('"')
        end = region.balance.end(self._held[region.body :], final=final)
        if end is None:
            if final:
                self._cut_off(region, events)
            return False
        end += region.body
        if region.closing:
            after = _skip(self._held, end)
            verdict = (
                "maybe"
                if after == len(self._held)
                else _prefix(self._held, after, (region.closing,))
            )
            if verdict == "maybe" and not final:
                return False
            if verdict == "yes":
                end = after + len(region.closing)
        self._close(region, end, events)
        return True

    def _close(self, region: _Region, end: int, events: list[Event]) -> None:
        text = self._held[:end]
        try:
            calls = region.parse(text)
        except ValueError:
            calls = []
        named = self._tools is None or region.tagged or region.closing
        if calls and (named or all(call.name in (self._tools or ()) for call in calls)):
            self._call(events, calls)
            self._held = self._held[end:]
            self._region = None
            # Another call may follow without a tag of its own, but code may not.
        elif region.tagged:
            self._region = _Region(_never, tagged=True)
        else:
            self._region = None
            self._say(events, end)

    def _gather_code(self, region: _Region, events: list[Event], final: bool) -> bool:
        """Code after a tag, up to an end mark."""
        ends = [at for mark in _ENDERS if (at := self._held.find(mark, region.body)) >= 0]
        if not ends and not final:
            region.body = max(0, len(self._held) - max(map(len, _ENDERS)))  # looked at so far
            return False
        end = min(ends, default=len(self._held))
        code = self._held[:end].strip()
        self._region = None
        if self._tools is None or CODE in self._tools:
            self._call(events, [ToolCall.make(CODE, {"code": code})])
            self._held = self._held[end:]
        else:
            self._say(events, end)
        return bool(self._held)

    def _call(self, events: list[Event], calls: list[ToolCall]) -> None:
        events.extend(calls)
        self._gap, self._called = "", True
        self._line_start = True

    def _cut_off(self, region: _Region, events: list[Event]) -> None:
        """The text ends within a region: a call if it is sure to be one, else content."""
        self._region = None
        sure = region.tagged or region.closing or self._tools is None
        if sure or (set(_WORD.findall(self._held)) & (self._tools or set())):
            events.append(Truncated(self._held))
            self._held, self._gap = "", None
        else:
            self._say(events, len(self._held))


def _parse_function(text: str) -> list[ToolCall]:
    name, _, body = text.removeprefix(_FUNCTION).partition(">")
    arguments = json_calls.parse_arguments(body.strip().removesuffix(_FUNCTION_END))
    if not name.strip():
        raise ValueError("no name")
    return [ToolCall.make(name.strip(), arguments)]


def _function_body(held: str) -> int | None:
    """Where the arguments of `<function=name>` begin; -1 when it is none, None while unknown."""
    found = _FUNCTION_HEADER.match(held)
    assert found is not None, "the region begins so"
    if found.end() == len(held):
        return None
    return found.end() if found[2] and found[1] and held[found.end()] == "{" else -1


def _never(text: str) -> list[ToolCall]:
    """Stands in a region of code, which is gathered up to an end mark."""
    raise ValueError(text)


def _skip(text: str, at: int) -> int:
    """The next place at or after `at` that is no space."""
    found = _SPACE.match(text, at)
    assert found is not None, "matches the empty string"
    return found.end()


def _prefix(text: str, at: int, words: Collection[str]) -> str:
    """Whether one of `words` stands at `at` ("yes"), or may once there is more ("maybe")."""
    maybe = False
    for word in words:
        if text.startswith(word, at):
            return "yes"
        maybe = maybe or (len(text) - at < len(word) and word.startswith(text[at:]))
    return "maybe" if maybe else "no"


def _joined(events: list[Event]) -> list[Event]:
    """Adjacent content as one event."""
    joined: list[Event] = []
    for event in events:
        if isinstance(event, Content) and joined and isinstance(joined[-1], Content):
            joined[-1] = Content(joined[-1].text + event.text)
        else:
            joined.append(event)
    return joined
