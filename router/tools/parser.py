"""Calls out of a stream of text, whichever of the known forms the model chose.

    <|python_tag|>brave_search.call(query="…")     built-in tools (3.1); also without the tag
    {"name": …, "parameters": {…}}                 JSON (3.1, 4), with or without a tag; lists too
    <function=name>{…}</function>                  custom tools (3.1)
    [f(a='x'), g()]                                pythonic (3.2, 4), with or without tags
    <tool_call>{…}</tool_call>                     and the other marks in `forms`

Words before, between and after calls are content. A call is given when it is complete, and no part
of it as content; what only looked like a call is given as content as soon as that is certain. A
call that lacks nothing but its last brackets when the model ends is complete all the same. How
the text is cut into pieces does not matter. Knows text; the caller must keep special tokens in
it (`skip_special_tokens` off), since some forms begin with one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from arriero.router.tools.balance import Balance, prefix
from arriero.router.tools.beginning import Answer, Beginning, Start, skip
from arriero.router.tools.events import Content, Event, ToolCall, Truncated
from arriero.router.tools.forms import ENDERS, HEADS, OPENERS, WRAPS
from arriero.router.tools.partial import complete_calls

CODE = "code_interpreter"
"""The tool that Python code after a tag is for; its one argument is `code`."""

_MARKS = (*OPENERS, *ENDERS)
_FORMS = (*(head.opening for head in HEADS), *(wrap.opening for wrap in WRAPS))
_TRIGGER = re.compile(r"[<{\[\n`]")
_GAP = re.compile(r"[\s;,]*")
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[\w.]+")


@dataclass(slots=True)
class _Region:
    """Text that is being gathered as a call, from the start of what is held.

    Attributes:
        start: how it begins; its `body` counts from the start of what is held.
        balance: finds the end of the body.
        tagged: one of Llama's tags went before it, so that what is no call is code.
    """

    start: Start
    balance: Balance
    tagged: bool = False


class ToolCallParser:
    """Splits one stream of text into content and calls.

    Args:
        tools: names of the tools on offer. Text without a tag is a call only when it names one of
            them; None takes any name.
    """

    def __init__(self, tools: Collection[str] | None = None) -> None:
        self._tools = None if tools is None else frozenset(tools)
        self._beginning = Beginning(self._tools)
        self._held = ""
        self._region: _Region | None = None
        self._code_from: int | None = None  # looked at so far, while code is gathered
        self._after_tag = False
        # Spaces (and separators, after a call) that are dropped if a call follows.
        self._gap: str | None = ""
        self._called = False
        self._closing = ""  # of a wrap whose first call is out
        self._line_start = True

    def add(self, text: str, *, final: bool = False, cut: bool = False) -> list[Event]:
        """What is certain now.

        Args:
            text: the next piece.
            final: nothing follows.
            cut: the model would have said more, had it not been cut off; only with `final`.
        """
        self._held += text
        events: list[Event] = []
        while self._step(events, final, cut):
            pass
        if final:
            if self._gap and not self._called:
                events.append(Content(self._gap))
            self._gap = None
        return _joined(events)

    def _step(self, events: list[Event], final: bool, cut: bool) -> bool:
        """Take one thing off the start of what is held; False when that must wait."""
        if self._region is not None:
            return self._gather(self._region, events, final, cut)
        if self._code_from is not None:
            return self._gather_code(self._code_from, events, final)
        if not self._held:
            return False
        if self._after_tag:
            return self._begin_tagged(final)
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
            if self._closing:
                closed = prefix(self._held, 0, (self._closing,))
                if closed:
                    self._held = self._held[len(self._closing) :]
                    self._closing = ""
                    return True
                if closed is None:  # the beginning of it is no content either
                    self._held = "" if final else self._held
                    return False
        at = 0
        while at < len(self._held):
            if self._held[at] == "\n":  # what follows stands at the start of a line
                at += 1
                continue
            starts_line = self._line_start if at == 0 else self._held[at - 1] == "\n"
            answer = self._look(at, starts_line)
            if answer is not False and not (answer is None and final):
                if at:
                    self._say(events, at)
                elif isinstance(answer, Start):
                    self._begin(answer)
                elif answer:
                    self._take_mark()
                return answer is not None
            after = _TRIGGER.search(self._held, at + 1)
            at = len(self._held) if after is None else after.start()
        self._say(events, len(self._held))
        return False

    def _look(self, at: int, starts_line: bool) -> Answer:
        """Whether a call or one of Llama's own marks (True) stands at `at`."""
        mark = prefix(self._held, at, _MARKS) if self._held[at] == "<" else False
        if mark:
            return True
        answer = self._beginning.look(self._held, at, starts_line)
        return answer if mark is False or isinstance(answer, Start) else None

    def _say(self, events: list[Event], size: int) -> None:
        text, self._held = self._held[:size], self._held[size:]
        self._line_start = text.endswith("\n")
        events.append(Content((self._gap or "") + text))
        self._gap, self._closing = None, ""

    def _take_mark(self) -> None:
        mark = next(mark for mark in _MARKS if self._held.startswith(mark))
        self._held = self._held[len(mark) :]
        self._after_tag = mark in OPENERS

    def _begin(self, start: Start, *, tagged: bool = False) -> None:
        """Open the region that begins at the start of what is held."""
        if start.parse is None:  # a wrap around another form
            self._held = self._held[start.body :]
            self._closing = start.closing
            return
        quotes = "\"'" if start.python else '"'
        marks = (*ENDERS, start.closing) if start.closing else ENDERS
        balance = Balance(quotes, triple=start.python, marks=marks)
        self._region = _Region(start, balance, tagged)

    def _begin_tagged(self, final: bool) -> bool:
        """After a tag: a call in one of the forms, or else code."""
        held = self._held
        at = skip(held, 0)
        if at == len(held):
            if final:
                self._after_tag, self._held = False, ""
            return False
        mark = prefix(held, at, (*_MARKS, *_FORMS))
        answer = self._beginning.tagged(held, at) if mark is False else mark
        if answer is None and not final:
            return False
        self._after_tag = False
        if isinstance(answer, Start):
            self._begin(answer, tagged=True)
        elif answer:
            self._held = held[at:]
        else:
            self._code_from = 0
        return True

    def _gather(self, region: _Region, events: list[Event], final: bool, cut: bool) -> bool:
        """Go on with a region, until its end or that of the text."""
        start = region.start
        balance = region.balance
        end = balance.end(self._held[start.body :], final=final)
        if end is None and (final or balance.ended is not None):
            if balance.ended is None and cut:
                self._cut_off(region, events)
                return False
            # the model's own end: of what lacks its last brackets there is no doubt
            size = len(self._held) if balance.ended is None else start.body + balance.ended
            body = self._held[start.body : size] + (balance.missing or "")
            self._close(region, size, events, body)
            return True
        if end is None:
            return False
        end += start.body
        body = self._held[start.body : end]
        if start.closing:
            after = skip(self._held, end)
            closed = None
            if after < len(self._held):
                closed = prefix(self._held, after, (start.closing,))
            if closed is None and not final:
                return False
            if closed:
                end = after + len(start.closing)
                region.start = replace(start, closing="")
        self._close(region, end, events, body)
        return True

    def _close(self, region: _Region, end: int, events: list[Event], body: str) -> None:
        """Give what ends at `end` as the calls that `body` holds, or else as content or code."""
        assert region.start.parse is not None, "a region is of a form that is read"
        try:
            calls = region.start.parse(body)
        except ValueError:
            calls = []
        sure = self._tools is None or region.tagged or region.start.sure
        self._region = None
        if calls and (sure or all(call.name in (self._tools or ()) for call in calls)):
            self._call(events, calls)
            self._held = self._held[end:]
            self._closing = region.start.closing or self._closing
            # Another call may follow without a tag of its own, but code may not.
        elif region.tagged:
            self._code_from = 0
        else:
            self._say(events, end)

    def _gather_code(self, looked: int, events: list[Event], final: bool) -> bool:
        """Code after a tag, up to an end mark."""
        ends = [at for mark in ENDERS if (at := self._held.find(mark, looked)) >= 0]
        if not ends and not final:
            self._code_from = max(0, len(self._held) - max(map(len, ENDERS)))
            return False
        end = min(ends, default=len(self._held))
        code = self._held[:end].strip()
        self._code_from = None
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
        start = region.start
        sure = region.tagged or start.sure or self._tools is None
        if sure or (set(_WORD.findall(self._held)) & (self._tools or set())):
            calls: list[ToolCall] = []
            rest = self._held
            if not start.named:
                calls, rest = complete_calls(self._held[start.body :])
            self._call(events, calls)
            events.append(Truncated(rest))
            self._held, self._gap = "", None
        else:
            self._say(events, len(self._held))


def _joined(events: list[Event]) -> list[Event]:
    """Adjacent content as one event."""
    joined: list[Event] = []
    for event in events:
        if isinstance(event, Content) and joined and isinstance(joined[-1], Content):
            joined[-1] = Content(joined[-1].text + event.text)
        else:
            joined.append(event)
    return joined
