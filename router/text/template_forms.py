"""In which form a chat template takes messages, found out by probe conversations.

Templates differ in what they expect of `content` (a text, or a list of parts), of the content
beside tool calls (text or null) and of a call's arguments (an object or JSON text); given the other
form, some fail and some leave the words out without a sign. A probe lays words of its own out in
each form and looks whether they come out. Knows templates and messages; knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from arriero.router.text.chat_template import ChatTemplate, TemplateError

Message = Mapping[str, Any]

ALIASES = {"developer": "system", "ipython": "tool", "tool": "ipython"}
"""Roles that stand in for each other where a template knows one of them alone."""
ABSENT: Mapping[str, None] = {"tools": None, "documents": None}
_FUNCTION = "function"


@dataclass(frozen=True, kw_only=True, slots=True)
class Forms:
    """How a template takes messages.

    Attributes:
        parts: roles whose content it takes as a list of parts alone.
        lost: roles whose words it leaves out in either form, without refusing them.
        refused: why it refuses a role, by role.
        shows_tools: functions on offer come out.
        shows_calls: calls of an assistant's earlier turn come out.
        call_content: what it takes as content beside calls where there is none: "" or None.
        text_arguments: it takes a call's arguments as JSON text.
        before_user: what stands before the user's words, when these are all.
        after_turn: what follows the assistant's words, where the user goes on, and at the end.
        ignores_prompt: `add_generation_prompt` changes nothing though a turn has a head of its own.
        absent: what it is given as `tools` and `documents` where there are none: None, as from
            transformers, or nothing for a template that would walk over them.
        written: all that the probes gave, to look for special tokens in.
    """

    parts: frozenset[str]
    lost: frozenset[str]
    refused: Mapping[str, str]
    shows_tools: bool
    shows_calls: bool
    call_content: str | None
    text_arguments: bool
    before_user: str
    after_turn: tuple[str, str]
    ignores_prompt: bool
    absent: Mapping[str, None]
    written: str

    def role(self, role: str) -> str:
        """The role under which the template shows a message of `role`."""
        other = ALIASES.get(role)
        if other is None or not (role in self.lost or role in self.refused):
            return role
        return role if other in self.lost or other in self.refused else other

    def lay(self, message: Message) -> dict[str, Any]:
        """A message, with content as text or as parts, in the form that the template takes."""
        laid = {**message, "role": self.role(message["role"])}
        calls = laid.get("tool_calls")
        content = laid.get("content")
        if calls and not content:
            laid["content"] = self.call_content
        elif isinstance(content, str) and laid["role"] in self.parts:
            laid["content"] = as_parts(content)
        if calls and self.text_arguments:
            laid["tool_calls"] = [_with_text_arguments(call) for call in calls]
        return laid


def as_parts(text: str) -> list[dict[str, str]]:
    """A text as a list of parts."""
    return [{"type": "text", "text": text}]


def probe(template: ChatTemplate, tokens: Mapping[str, str]) -> Forms:
    """Find out how a template takes messages.

    Args:
        template: the template.
        tokens: the special tokens' text that it may ask for, by variable.
    """
    return _Probe(template, tokens).run()


class _Probe:
    def __init__(self, template: ChatTemplate, tokens: Mapping[str, str]) -> None:
        self._template, self._tokens = template, tokens
        self._stem = "arrieroprobe"
        while self._stem in template.source:
            self._stem += "x"
        self._more: Mapping[str, Any] = ABSENT
        self._why = ""
        self._seen: list[str] = []
        self._parts: set[str] = set()
        self._lost: set[str] = set()
        self._refused: dict[str, str] = {}

    def run(self) -> Forms:
        self._take_user()
        user = self._message("user")
        self._take("system", lambda one: [one, user])
        self._take("assistant", lambda one: [user, one, self._message("user", "again")])
        content, as_text, shows_calls = self._calls()
        calls = self._call(content, as_text=as_text)
        for role in ("tool", "ipython"):
            self._take(role, lambda one: [user, calls, one], tool_call_id="arriero01", name="probe")
        self._take("developer", lambda one: [one, user])
        after, ignores_prompt = self._turns()
        return Forms(
            parts=frozenset(self._parts),
            lost=frozenset(self._lost),
            refused=self._refused,
            shows_tools=self._shows_tools(),
            shows_calls=shows_calls,
            call_content=content,
            text_arguments=as_text,
            before_user=(self._render([user]) or "").partition(self._word("user"))[0],
            after_turn=after,
            ignores_prompt=ignores_prompt,
            absent={} if self._more == {} else ABSENT,
            written="\n".join(self._seen),
        )

    def _word(self, name: str) -> str:
        return self._stem + name

    def _message(self, role: str, name: str = "") -> Message:
        """Words of a role whose form is known."""
        text = self._word(name or role)
        return {"role": role, "content": as_parts(text) if role in self._parts else text}

    def _render(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = True,
        tools: Sequence[Message] | None = None,
    ) -> str | None:
        """What comes out; None where the template refuses."""
        given = {
            **self._tokens,
            **self._more,
            "messages": list(messages),
            "add_generation_prompt": prompt,
        }
        if tools is not None:
            given["tools"] = tools
        try:
            text = self._template.render(given)
        except TemplateError as error:
            self._why = str(error)
            return None
        self._seen.append(text)
        return text

    def _take_user(self) -> None:
        """The user's form, with whatever else the template asks for."""
        documents = [{"title": self._word("title"), "text": self._word("text")}]
        reasons = []
        for more in (ABSENT, {}, {"tools": self._tools()}, {"documents": documents}):
            self._more = more
            for before in ([], [self._message("system")]):
                self._refused.pop("user", None)
                self._take("user", partial(_after, before))
                if "user" not in self._refused:
                    return
                reasons.append(self._refused["user"])
        self._more, self._refused["user"] = ABSENT, reasons[0]

    def _tools(self) -> list[Message]:
        function = {
            "name": self._word("tool"),
            "description": "probe",
            "parameters": {"type": "object", "properties": {}},
        }
        return [{"type": _FUNCTION, _FUNCTION: function}]

    def _take(self, role: str, talk: Callable[[Message], list[Message]], **more: str) -> None:
        """Note the form in which words of `role` come out."""
        word = self._word(role)
        why, rendered = "", False
        self._why = ""
        for content in (word, as_parts(word)):
            text = self._render(talk({"role": role, "content": content, **more}))
            rendered = rendered or text is not None
            why = why or self._why
            if text is not None and word in text:
                if content is not word:
                    self._parts.add(role)
                return
        if rendered:
            self._lost.add(role)
        else:
            self._refused[role] = why

    def _call(self, content: str | None, *, as_text: bool) -> Message:
        function = {"name": self._word("call"), "arguments": {"x": self._word("value")}}
        call = {"id": "arriero01", "type": _FUNCTION, _FUNCTION: function}
        if as_text:
            call = _with_text_arguments(call)
        return {"role": "assistant", "content": content, "tool_calls": [call]}

    def _calls(self) -> tuple[str | None, bool, bool]:
        """Content beside calls, whether arguments are text, and whether calls come out."""
        best: tuple[int, str | None, bool] = (0, "", False)
        user = self._message("user")
        for as_text in (False, True):
            for content in ("", None):
                text = self._render([user, self._call(content, as_text=as_text)]) or ""
                score = (self._word("call") in text) + (self._word("value") in text)
                if score > best[0]:
                    best = (score, content, as_text)
        return best[1], best[2], best[0] > 0

    def _shows_tools(self) -> bool:
        if not self._template.knows_tools:
            return False
        tools = self._tools()
        user = self._message("user")
        texts = [
            self._render(talk, tools=tools) for talk in ([user], [self._message("system"), user])
        ]
        shown = [self._word("tool") in text for text in texts if text is not None]
        return any(shown) or not shown

    def _turns(self) -> tuple[tuple[str, str], bool]:
        """What follows the assistant's words, and whether no generation prompt comes."""
        user, assistant = self._message("user"), self._message("assistant")
        again = self._message("user", "again")
        word = self._word("assistant")
        amid = self._render([user, assistant, again]) or ""
        last = self._render([user, assistant], prompt=False) or ""
        follows = amid.partition(word)[2].partition(self._word("again"))[0]
        opened, plain = self._render([user]), self._render([user], prompt=False)
        ignores = False
        if opened is not None and opened == plain and last.startswith(opened):
            ignores = bool(last[len(opened) :].partition(word)[0].strip())
        return (follows, last.partition(word)[2]), ignores


def _after(before: list[Message], message: Message) -> list[Message]:
    return [*before, message]


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call[_FUNCTION]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, _FUNCTION: {**function, "arguments": arguments}}
