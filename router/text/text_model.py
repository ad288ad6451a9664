"""A conversation to token ids, by a model's own template and tokenizer.

Knows how template, marks and tokenizer work together; knows nothing of requests or groups.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from arriero.router.text.agreement import check_tokens_agree
from arriero.router.text.chat_template import ChatTemplate, TemplateError
from arriero.router.text.chat_templates import ChatTemplates, ProbedTemplate
from arriero.router.text.constraints import GrammarCheck
from arriero.router.text.images import ImageReader, LaidImage
from arriero.router.text.model_card import ModelCard
from arriero.router.text.special_token_guard import strings
from arriero.router.text.tokenizer import Tokenizer
from arriero.shards.errors import InvalidRequest

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "ipython"})
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
)
"""Variables of a template that have fields of their own."""
REASONING = frozenset({"enable_thinking", "thinking", "thinking_budget", "reasoning_effort"})
"""Variables that clients send to every model: where a template does not read them, the model does
not reason, and the conversation is the same without them."""
CALL_TAGS = ("<|python_tag|>", "<|python_start|>", "<|python_end|>")
INLINE_CHARS = 8192
"""Texts up to so long are encoded on the event loop (about 2 ms); longer ones in a thread."""

log = logging.getLogger(__name__)


class TextModel:
    """The text side of one model: built once for each tokenizer, shared by its groups.

    Building it checks the checkpoint's text files against each other.

    Args:
        card: gives tokenizer, templates and special tokens' text.
        warm: make ready for grammars as well, which takes a second for 200,000 tokens; else
            `grammars.warm` does, later.

    Raises:
        CheckpointError: tokenizer or template cannot be read, or they do not agree with each other
            or with the model's vocabulary.

    Attributes:
        key: the card's `text_key`.
        warnings: what the text files say that is odd or is not taken, in words.
    """

    def __init__(self, card: ModelCard, *, warm: bool = True) -> None:
        self.key = card.text_key
        self.tokenizer = Tokenizer(card.tokenizer_json)
        self._templates = ChatTemplates(card, self.tokenizer)
        self._tokens = card.template_tokens
        self._model = card.model
        self._vocab_size = card.vocab_size
        self.grammars = GrammarCheck(card)
        self.images = ImageReader(card, self.tokenizer.control_ids)
        self.warnings = (
            *card.warnings,
            *check_tokens_agree(card, self.tokenizer),
            *self._templates.warnings,
        )
        for words in self.warnings:
            log.warning("model %s: %s", card.model, words)
        if warm:
            self.grammars.warm()

    @property
    def call_tags(self) -> list[str]:
        """The special tokens beside which calls stand, of those that the tokenizer has."""
        return [tag for tag in CALL_TAGS if tag in self.tokenizer.control_ids]

    async def encode(self, text: str, *, add_special_tokens: bool, trusted: bool) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode` and `encode_trusted`."""
        encode = self.tokenizer.encode_trusted if trusted else self.tokenizer.encode
        if len(text) <= INLINE_CHARS:
            ids = encode(text, add_special_tokens=add_special_tokens)
        else:
            ids = await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)
        return self._with_rows("prompt", ids)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        images: Sequence[LaidImage] = (),
    ) -> list[int]:
        """Token ids of a conversation; see `layout`."""
        size = sum(map(len, strings([*messages, *tools, *documents])))
        arguments = (
            messages, add_generation_prompt, continue_final_message, tools, documents, variables,
            images,
        )  # fmt: skip
        if size <= INLINE_CHARS:
            return self.layout(*arguments)
        return await asyncio.to_thread(self.layout, *arguments)

    def layout(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        images: Sequence[LaidImage] = (),
    ) -> list[int]:
        """Token ids of a conversation; only the template writes special tokens.

        Args:
            messages: mappings with `role` and `content`, and what else templates know.
            add_generation_prompt: open the assistant's turn at the end.
            continue_final_message: leave the last message's turn open instead.
            tools: functions on offer, in the form {"type": "function", "function": {…}}.
            documents: texts to answer from, mappings with `title` and `text`.
            variables: what else the template reads, such as `date_string`.
            images: those that the parts of the messages stand for, in order.

        Raises:
            InvalidRequest: a role, a variable or the whole is not what the template takes.
        """
        if not self._templates:
            raise InvalidRequest(
                "messages",
                f"model {self._model!r} has no chat template; lay the prompt out yourself and call "
                "Generate",
            )
        _check(messages, add_generation_prompt, continue_final_message)
        chosen = self._templates.choose(messages, tools=bool(tools), documents=bool(documents))
        self._check_shown(chosen, messages, tools)
        more = dict(variables or {})
        self._check_variables(chosen.template, more, documents)
        marker = self.tokenizer.marker
        callers = [*messages, *tools, *documents, more]
        mark = marker.choose([*strings(callers), chosen.template.source])
        marked = [
            {**marker.mark_all(message, mark), "role": message["role"]} for message in messages
        ]
        end = mark + mark
        tail = ""
        if continue_final_message:
            content = marked[-1]["content"]
            if not isinstance(content, str):
                raise InvalidRequest(
                    "continue_final_message",
                    "`continue_final_message` goes on with text; the final message holds an image",
                )
            body = content.rstrip()
            tail = content[len(body) :]
            marked[-1]["content"] = body + end + tail
        given = {
            **marker.mark_all(more, mark),
            **self._tokens,
            **chosen.forms.absent,
            "messages": [chosen.forms.lay(message) for message in marked],
            "add_generation_prompt": add_generation_prompt,
        }
        if tools:
            given["tools"] = marker.mark_all(list(tools), mark)
        if documents:
            given["documents"] = marker.mark_all(list(documents), mark)
        try:
            rendered = _render(chosen.template, given)
        except TemplateError as error:  # whose words may quote what was marked
            raise TemplateError(str(error).replace(mark, "")) from None
        chosen.check_words(given, rendered, self._model)
        if continue_final_message:
            at = rendered.rfind(end)
            if at < 0:
                raise TemplateError("the chat template leaves the final message out")
            # The spaces at the end belong to the turn when the template kept them.
            kept = tail if rendered.startswith(tail, at + len(end)) else ""
            rendered = rendered[:at] + kept
        ids = self.tokenizer.encode_pieces(marker.split(rendered, mark))
        self._with_rows("messages", ids)
        return self._with_images(ids, images) if images else ids

    def _with_rows(self, field: str, ids: list[int]) -> list[int]:
        """`ids`, each of which the model has a row for: a tokenizer may have more tokens.

        Raises:
            InvalidRequest: one has none.
        """
        if self.tokenizer.size > self._vocab_size and max(ids, default=0) >= self._vocab_size:
            token = next(one for one in ids if one >= self._vocab_size)
            text = self.tokenizer.decode([token], skip_special=False)
            raise InvalidRequest(
                field,
                f"`{field}` holds {text[:64]!r}, token {token} of the tokenizer; model "
                f"{self._model!r} has rows for 0 to {self._vocab_size - 1} alone; leave it out",
            )
        return ids

    def _check_shown(
        self,
        chosen: ProbedTemplate,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        """Refuse functions and calls that the template would leave out."""
        if tools and not chosen.forms.shows_tools:
            raise InvalidRequest(
                "tools",
                f"the chat template of model {self._model!r} cannot show tools to the model; leave "
                "`tools` out",
            )
        if chosen.forms.shows_calls:
            return
        for number, message in enumerate(messages):
            if message.get("tool_calls"):
                raise InvalidRequest(
                    "messages",
                    f"the chat template of model {self._model!r} cannot show "
                    f"`messages[{number}].tool_calls` to the model; say in `content` what was "
                    "called",
                )

    def _with_images(self, ids: Sequence[int], images: Sequence[LaidImage]) -> list[int]:
        """`ids` with each image's tokens where the template left a place for it."""
        place = self.images.place
        if ids.count(place) != len(images):
            raise InvalidRequest(
                "messages",
                f"the chat template of model {self._model!r} leaves {ids.count(place)} places for "
                f"{len(images)} images; send text alone",
            )
        left = iter(images)
        laid: list[int] = []
        for token in ids:
            if token == place:
                laid += next(left).tokens
            else:
                laid.append(token)
        return laid

    def _check_variables(
        self,
        template: ChatTemplate,
        variables: Mapping[str, Any],
        documents: Sequence[Mapping[str, Any]],
    ) -> None:
        """Refuse what the template would ignore, and names that are given otherwise."""
        if documents and not template.reads("documents"):
            raise InvalidRequest(
                "documents",
                f"the chat template of model {self._model!r} cannot show documents to the model; "
                "put them into a message",
            )
        for name in variables:
            if name in RESERVED:
                raise InvalidRequest(
                    "template_variables",
                    f"`template_variables.{name}` is given by a field of its own; use that",
                )
            if not template.reads(name) and name not in REASONING:
                raise InvalidRequest(
                    "template_variables",
                    f"the chat template of model {self._model!r} does not read "
                    f"{name[:64]!r}; leave it out of `template_variables`",
                )


def _render(template: ChatTemplate, given: Mapping[str, Any]) -> str:
    """The conversation as text, also where a call's arguments are no JSON object.

    Most templates print the arguments; those that go through their names are shown them as one
    argument, rather than that a model's slip ends the conversation.
    """
    try:
        return template.render(given)
    except TemplateError:
        messages = [_with_objects(message) for message in given["messages"]]
        if messages == given["messages"]:
            raise
        return template.render({**given, "messages": messages})


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = message.get("tool_calls", ())
    if not any(isinstance(call["function"]["arguments"], str) for call in calls):
        return message
    mended = []
    for call in calls:
        function = call["function"]
        if isinstance(function["arguments"], str):
            function = {**function, "arguments": {"arguments": function["arguments"]}}
        mended.append({**call, "function": function})
    return {**message, "tool_calls": mended}


def _check(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, continue_final: bool
) -> None:
    if not messages:
        raise InvalidRequest("messages", "`messages` is empty; give at least one")
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise InvalidRequest(
                "messages",
                f"`messages[{number}].role`={str(message['role'])[:64]!r} must be one of "
                f"{', '.join(sorted(ROLES))}",
            )
    if continue_final and add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message",
            "`continue_final_message` and `add_generation_prompt` exclude each other; give one",
        )
