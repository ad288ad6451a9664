"""Probe conversations that find the form of messages for a chat template.

Templates differ in the form of `content` (a text, or a list of parts), of the content beside tool
calls (text or null) and of a call's arguments (an object or JSON text). With the wrong form some
templates fail and others leave the words out silently. A probe renders its own words in each form
and checks whether the words come out. Knows templates and messages; knows nothing of tokens.
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
"""Roles that replace each other in a template that knows only the other role."""
ABSENT: Mapping[str, None] = {"tools": None, "documents": None}
_FUNCTION = "function"


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateForms:
    """The form of messages for a template, and observations about the template.

    Attributes:
        parts: roles whose content must be a list of parts instead of a text.
        omitted: roles with words that the template leaves out in both forms, without an error.
        refused: reason of the refusal, by refused role.
        shows_tools: the output contains offered functions.
        shows_calls: the output contains calls of an earlier turn of the assistant.
        call_content: empty content beside calls: "" or None.
        text_arguments: the arguments of a call must be JSON text.
        before_user: text before the user's words, in a conversation of these words alone.
        after_turn: text after the assistant's words, before a turn of the user and at the end.
        ignores_prompt: `add_generation_prompt` has no effect although turns have a head.
        absent: variables for a conversation without tools and documents: None for both, as from
            transformers, or no variables for a template that loops over them.
        written: all outputs of the probes, for a search for special tokens.
    """

    parts: frozenset[str]
    omitted: frozenset[str]
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
        """The role for the template of a message of `role`."""
        alias = ALIASES.get(role)
        if alias is None or self._shows(role) or not self._shows(alias):
            return role
        return alias

    def _shows(self, role: str) -> bool:
        return role not in self.omitted and role not in self.refused

    def convert(self, message: Message) -> dict[str, Any]:
        """A message in the template's form, from content as text or as parts."""
        converted = {**message, "role": self.role(message["role"])}
        calls = converted.get("tool_calls")
        content = converted.get("content")
        if calls and not content:
            converted["content"] = self.call_content
        elif isinstance(content, str) and converted["role"] in self.parts:
            converted["content"] = as_parts(content)
        if calls and self.text_arguments:
            converted["tool_calls"] = [_with_text_arguments(call) for call in calls]
        return converted


def as_parts(text: str) -> list[dict[str, str]]:
    """A text as a list of parts."""
    return [{"type": "text", "text": text}]


def probe(template: ChatTemplate, tokens: Mapping[str, str]) -> TemplateForms:
    """The form of messages for a template.

    Args:
        template: the template.
        tokens: text of the special tokens, by variable of the template.
    """
    return _Probe(template, tokens).run()


class _Probe:
    def __init__(self, template: ChatTemplate, tokens: Mapping[str, str]) -> None:
        self._template, self._tokens = template, tokens
        self._stem = "arrieroprobe"
        while self._stem in template.source:
            self._stem += "x"
        self._extra: Mapping[str, Any] = ABSENT  # further variables of the template
        self._error = ""  # of the latest refusal
        self._outputs: list[str] = []
        self._parts: set[str] = set()
        self._omitted: set[str] = set()
        self._refused: dict[str, str] = {}

    def run(self) -> TemplateForms:
        self._probe_user()
        user = self._message("user")
        again = self._message("user", "again")
        self._probe_role("system", lambda message: [message, user])
        self._probe_role("assistant", lambda message: [user, message, again])
        content, as_text, shows_calls = self._probe_calls()
        calls = self._call(content, as_text=as_text)
        fields = {"tool_call_id": "arriero01", "name": "probe"}
        for role in ("tool", "ipython"):
            self._probe_role(role, lambda message: [user, calls, message], **fields)
        self._probe_role("developer", lambda message: [message, user])
        after, ignores_prompt = self._probe_turns()
        return TemplateForms(
            parts=frozenset(self._parts),
            omitted=frozenset(self._omitted),
            refused=self._refused,
            shows_tools=self._probe_tools(),
            shows_calls=shows_calls,
            call_content=content,
            text_arguments=as_text,
            before_user=(self._render([user]) or "").partition(self._word("user"))[0],
            after_turn=after,
            ignores_prompt=ignores_prompt,
            absent={} if self._extra == {} else ABSENT,
            written="\n".join(self._outputs),
        )

    def _word(self, name: str) -> str:
        return self._stem + name

    def _message(self, role: str, name: str = "") -> Message:
        """A message with probe words, after the probe of its role."""
        text = self._word(name or role)
        return {"role": role, "content": as_parts(text) if role in self._parts else text}

    def _render(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = True,
        tools: Sequence[Message] | None = None,
    ) -> str | None:
        """The output for a conversation; None when the template refuses it."""
        variables = {
            **self._tokens,
            **self._extra,
            "messages": list(messages),
            "add_generation_prompt": prompt,
        }
        if tools is not None:
            variables["tools"] = tools
        try:
            text = self._template.render(variables)
        except TemplateError as error:
            self._error = str(error)
            return None
        self._outputs.append(text)
        return text

    def _probe_user(self) -> None:
        """Find the form of the user's messages, and the further variables for the template."""
        documents = [{"title": self._word("title"), "text": self._word("text")}]
        reasons = []
        for extra in (ABSENT, {}, {"tools": self._tools()}, {"documents": documents}):
            self._extra = extra
            for before in ([], [self._message("system")]):
                self._refused.pop("user", None)
                self._probe_role("user", partial(_after, before))
                if "user" not in self._refused:
                    return
                reasons.append(self._refused["user"])
        self._extra, self._refused["user"] = ABSENT, reasons[0]

    def _tools(self) -> list[Message]:
        function = {
            "name": self._word("tool"),
            "description": "probe",
            "parameters": {"type": "object", "properties": {}},
        }
        return [{"type": _FUNCTION, _FUNCTION: function}]

    def _probe_role(
        self, role: str, talk: Callable[[Message], list[Message]], **fields: str
    ) -> None:
        """Record the form in which words of `role` come out."""
        word = self._word(role)
        reason, rendered = "", False
        self._error = ""
        for content in (word, as_parts(word)):
            text = self._render(talk({"role": role, "content": content, **fields}))
            rendered = rendered or text is not None
            reason = reason or self._error
            if text is not None and word in text:
                if content is not word:
                    self._parts.add(role)
                return
        if rendered:
            self._omitted.add(role)
        else:
            self._refused[role] = reason

    def _call(self, content: str | None, *, as_text: bool) -> Message:
        function = {"name": self._word("call"), "arguments": {"x": self._word("value")}}
        call = {"id": "arriero01", "type": _FUNCTION, _FUNCTION: function}
        if as_text:
            call = _with_text_arguments(call)
        return {"role": "assistant", "content": content, "tool_calls": [call]}

    def _probe_calls(self) -> tuple[str | None, bool, bool]:
        """Content beside calls, whether arguments are text, and whether the output has calls."""
        best: tuple[int, str | None, bool] = (0, "", False)
        user = self._message("user")
        for as_text in (False, True):
            for content in ("", None):
                text = self._render([user, self._call(content, as_text=as_text)]) or ""
                score = (self._word("call") in text) + (self._word("value") in text)
                if score > best[0]:
                    best = (score, content, as_text)
        return best[1], best[2], best[0] > 0

    def _probe_tools(self) -> bool:
        if not self._template.knows_tools:
            return False
        tools = self._tools()
        user = self._message("user")
        texts = [
            self._render(talk, tools=tools) for talk in ([user], [self._message("system"), user])
        ]
        shown = [self._word("tool") in text for text in texts if text is not None]
        return any(shown) or not shown

    def _probe_turns(self) -> tuple[tuple[str, str], bool]:
        """`after_turn` and `ignores_prompt` of `TemplateForms`."""
        user, assistant = self._message("user"), self._message("assistant")
        again = self._message("user", "again")
        word = self._word("assistant")
        middle = self._render([user, assistant, again]) or ""
        last = self._render([user, assistant], prompt=False) or ""
        follows = middle.partition(word)[2].partition(self._word("again"))[0]
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
