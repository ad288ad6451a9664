"""Calls and content from a stream of text, in all known forms of calls.

    <|python_tag|>brave_search.call(query="…")     built-in tools (3.1); also without the tag
    {"name": …, "parameters": {…}}                 JSON (3.1, 4), with or without a tag; lists too
    <function=name>{…}</function>                  custom tools (3.1)
    [f(a='x'), g()]                                pythonic (3.2, 4), with or without tags
    <tool_call>{…}</tool_call>                     and the other marks in `forms`

Text before, between and after calls is content. A complete call is given as a call, and no part of
it as content; text that only looked like a call is given as content as soon as that is certain. A
call that lacks only the last brackets at the model's own end is complete. The division of the text
into pieces has no effect. Knows text; the caller must keep special tokens in the text
(`skip_special_tokens` off), since some forms begin with a special token.
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
"""The tool that runs Python code after a tag; its only argument is `code`."""

_MARKS = (*OPENERS, *ENDERS)
_FORMS = (*(head.opening for head in HEADS), *(wrap.opening for wrap in WRAPS))
_TRIGGER = re.compile(r"[<{\[\n`]")
_GAP = re.compile(r"[\s;,]*")
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[\w.]+")


@dataclass(slots=True)
class _Region:
    """A possible call at the start of the buffer, while its text arrives.

    Attributes:
        start: beginning of the call; `start.body` is a position in the buffer.
        balance: finds the end of the body.
        tagged: the text follows one of Llama's tags, and is code if it is no call.
    """

    start: Start
    balance: Balance
    tagged: bool = False


class ToolCallParser:
    """Divides a stream of text into content and calls.

    Args:
        tools: names of the offered tools. Text without a tag is a call only with one of these
            names; None accepts all names.
    """

    def __init__(self, tools: Collection[str] | None = None) -> None:
        self._tools = None if tools is None else frozenset(tools)
        self._beginning = Beginning(self._tools)
        self._buffer = ""
        self._region: _Region | None = None
        self._code_from: int | None = None  # position of unread code in the buffer; None: no code
        self._after_tag = False
        # Spaces (and separators, after a call) that are dropped if a call follows.
        self._gap: str | None = ""
        self._called = False
        self._closing = ""  # closing mark of a wrap, after its first call
        self._line_start = True

    def add(self, text: str, *, final: bool = False, cut: bool = False) -> list[Event]:
        """The events that are certain now.

        Args:
            text: the next piece.
            final: no text follows.
            cut: a limit ended the output, not the model; only with `final`.
        """
        self._buffer += text
        events: list[Event] = []
        while self._step(events, final, cut):
            pass
        if final:
            if self._gap and not self._called:
                events.append(Content(self._gap))
            self._gap = None
        return _joined(events)

    def _step(self, events: list[Event], final: bool, cut: bool) -> bool:
        """Take an item off the start of the buffer; False when the parser must wait for text."""
        if self._region is not None:
            return self._read_region(self._region, events, final, cut)
        if self._code_from is not None:
            return self._read_code(self._code_from, events, final)
        if not self._buffer:
            return False
        if self._after_tag:
            return self._begin_after_tag(final)
        return self._scan(events, final)

    def _scan(self, events: list[Event], final: bool) -> bool:
        """Emit content up to the next possible beginning of a call."""
        if self._gap is not None:
            gap = (_GAP if self._called else _SPACE).match(self._buffer)
            assert gap is not None, "the pattern matches the empty string"
            if gap.end():
                self._line_start = self._line_start or "\n" in gap[0]
                self._gap += gap[0]
                self._buffer = self._buffer[gap.end() :]
                return bool(self._buffer)
            if self._closing:
                closed = prefix(self._buffer, 0, (self._closing,))
                if closed:
                    self._buffer = self._buffer[len(self._closing) :]
                    self._closing = ""
                    return True
                if closed is None:  # the beginning of a closing mark is no content either
                    self._buffer = "" if final else self._buffer
                    return False
        at = 0
        while at < len(self._buffer):
            if self._buffer[at] == "\n":  # the next character is at the start of a line
                at += 1
                continue
            starts_line = self._line_start if at == 0 else self._buffer[at - 1] == "\n"
            answer = self._check(at, starts_line)
            if answer is not False and not (answer is None and final):
                if at:
                    self._emit_content(events, at)
                elif isinstance(answer, Start):
                    self._begin(answer)
                elif answer:
                    self._take_mark()
                return answer is not None
            after = _TRIGGER.search(self._buffer, at + 1)
            at = len(self._buffer) if after is None else after.start()
        self._emit_content(events, len(self._buffer))
        return False

    def _check(self, at: int, starts_line: bool) -> Answer:
        """Whether a call begins at `at`; True for one of Llama's own marks."""
        mark = prefix(self._buffer, at, _MARKS) if self._buffer[at] == "<" else False
        if mark:
            return True
        answer = self._beginning.check(self._buffer, at, starts_line)
        return answer if mark is False or isinstance(answer, Start) else None

    def _emit_content(self, events: list[Event], size: int) -> None:
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        self._line_start = text.endswith("\n")
        events.append(Content((self._gap or "") + text))
        self._gap, self._closing = None, ""

    def _take_mark(self) -> None:
        mark = next(mark for mark in _MARKS if self._buffer.startswith(mark))
        self._buffer = self._buffer[len(mark) :]
        self._after_tag = mark in OPENERS

    def _begin(self, start: Start, *, tagged: bool = False) -> None:
        """Begin a region at the start of the buffer."""
        if start.parse is None:  # a wrap around another form
            self._buffer = self._buffer[start.body :]
            self._closing = start.closing
            return
        quotes = "\"'" if start.python else '"'
        marks = (*ENDERS, start.closing) if start.closing else ENDERS
        balance = Balance(quotes, triple=start.python, marks=marks)
        self._region = _Region(start, balance, tagged)

    def _begin_after_tag(self, final: bool) -> bool:
        """Begin a call in one of the forms after a tag, otherwise code."""
        buffer = self._buffer
        at = skip(buffer, 0)
        if at == len(buffer):
            if final:
                self._after_tag, self._buffer = False, ""
            return False
        mark = prefix(buffer, at, (*_MARKS, *_FORMS))
        answer = self._beginning.check_after_tag(buffer, at) if mark is False else mark
        if answer is None and not final:
            return False
        self._after_tag = False
        if isinstance(answer, Start):
            self._begin(answer, tagged=True)
        elif answer:
            self._buffer = buffer[at:]
        else:
            self._code_from = 0
        return True

    def _read_region(self, region: _Region, events: list[Event], final: bool, cut: bool) -> bool:
        """Read a region until the end of the region or of the text."""
        start = region.start
        balance = region.balance
        end = balance.end(self._buffer[start.body :], final=final)
        if end is None and (final or balance.mark_at is not None):
            if balance.mark_at is None and cut:
                self._cut_off(region, events)
                return False
            # At the model's own end, a call that lacks only the last brackets is complete.
            size = len(self._buffer) if balance.mark_at is None else start.body + balance.mark_at
            body = self._buffer[start.body : size] + (balance.missing or "")
            self._close(region, size, events, body)
            return True
        if end is None:
            return False
        end += start.body
        body = self._buffer[start.body : end]
        if start.closing:
            after = skip(self._buffer, end)
            closed = None
            if after < len(self._buffer):
                closed = prefix(self._buffer, after, (start.closing,))
            if closed is None and not final:
                return False
            if closed:
                end = after + len(start.closing)
                region.start = replace(start, closing="")
        self._close(region, end, events, body)
        return True

    def _close(self, region: _Region, end: int, events: list[Event], body: str) -> None:
        """Emit the calls of `body`; without calls the text up to `end` is content or code."""
        assert region.start.parse is not None, "a region's form has a parse function"
        try:
            calls = region.start.parse(body)
        except ValueError:
            calls = []
        sure = self._tools is None or region.tagged or region.start.sure
        self._region = None
        if calls and (sure or all(call.name in (self._tools or ()) for call in calls)):
            self._emit_calls(events, calls)
            self._buffer = self._buffer[end:]
            self._closing = region.start.closing or self._closing
            # Another call may follow without a tag; code needs a tag.
        elif region.tagged:
            self._code_from = 0
        else:
            self._emit_content(events, end)

    def _read_code(self, start: int, events: list[Event], final: bool) -> bool:
        """Read code after a tag, up to an end mark; the search begins at `start`."""
        ends = [at for mark in ENDERS if (at := self._buffer.find(mark, start)) >= 0]
        if not ends and not final:
            self._code_from = max(0, len(self._buffer) - max(map(len, ENDERS)))
            return False
        end = min(ends, default=len(self._buffer))
        code = self._buffer[:end].strip()
        self._code_from = None
        if self._tools is None or CODE in self._tools:
            self._emit_calls(events, [ToolCall.make(CODE, {"code": code})])
            self._buffer = self._buffer[end:]
        else:
            self._emit_content(events, end)
        return bool(self._buffer)

    def _emit_calls(self, events: list[Event], calls: list[ToolCall]) -> None:
        events.extend(calls)
        self._gap, self._called = "", True
        self._line_start = True

    def _cut_off(self, region: _Region, events: list[Event]) -> None:
        """Emit a region that the end of the output cut off, as a truncated call or as content."""
        self._region = None
        start = region.start
        sure = region.tagged or start.sure or self._tools is None
        if sure or (set(_WORD.findall(self._buffer)) & (self._tools or set())):
            calls: list[ToolCall] = []
            rest = self._buffer
            if not start.named:
                calls, rest = complete_calls(self._buffer[start.body :])
            self._emit_calls(events, calls)
            events.append(Truncated(rest))
            self._buffer, self._gap = "", None
        else:
            self._emit_content(events, len(self._buffer))


def _joined(events: list[Event]) -> list[Event]:
    """The events with adjacent content joined."""
    joined: list[Event] = []
    for event in events:
        if isinstance(event, Content) and joined and isinstance(joined[-1], Content):
            joined[-1] = Content(joined[-1].text + event.text)
        else:
            joined.append(event)
    return joined
