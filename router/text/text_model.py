"""A conversation to token ids, with the model's own template and tokenizer.

Knows how template, marks and tokenizer work together; knows nothing of requests or groups.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from arriero.router.text.agreement import check_tokens_agree
from arriero.router.text.chat_template import ChatTemplate, TemplateError
from arriero.router.text.chat_templates import ChatTemplates, ProbedTemplate
from arriero.router.text.constraints import GrammarCheck
from arriero.router.text.images import ImageReader, PromptImage
from arriero.router.text.model_card import ModelCard
from arriero.router.text.special_token_guard import strings
from arriero.router.text.tokenizer import Tokenizer
from arriero.shards.errors import InvalidRequest

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "ipython"})
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
)
"""Variables of templates with separate fields in a request."""
REASONING = frozenset({"enable_thinking", "thinking", "thinking_budget", "reasoning_effort"})
"""Variables that clients send to all models.

A template that does not read these variables belongs to a model without reasoning, so that leaving
the variables out does not change the conversation.
"""
CALL_TAGS = ("<|python_tag|>", "<|python_start|>", "<|python_end|>")
INLINE_CHARS = 8192
"""Largest text encoded on the event loop (about 2 ms), in characters; a thread encodes the rest."""

log = logging.getLogger(__name__)


class TextModel:
    """Tokenizer, templates, grammars and images of a model; groups with the same files share it.

    The constructor checks that the checkpoint's text files agree.

    Args:
        card: gives tokenizer, templates and texts of special tokens.
        warm: prepare for grammars as well, 1 second for 200,000 tokens; otherwise the caller calls
            `grammars.warm` later.

    Raises:
        CheckpointError: tokenizer or template cannot be read, or disagree with each other or with
            the model's vocabulary.

    Attributes:
        key: `text_key` of the card.
        warnings: a sentence for each oddity of the text files.
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
        for warning in self.warnings:
            log.warning("model %s: %s", card.model, warning)
        if warm:
            self.grammars.warm()

    @property
    def call_tags(self) -> list[str]:
        """The special tokens of the tokenizer that go before or after calls."""
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
        images: Sequence[PromptImage] = (),
        rewrite: Callable[[str], str] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; see `layout`."""
        size = sum(map(len, strings([*messages, *tools, *documents])))
        arguments = (
            messages, add_generation_prompt, continue_final_message, tools, documents, variables,
            images, rewrite,
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
        images: Sequence[PromptImage] = (),
        rewrite: Callable[[str], str] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; only the template writes special tokens.

        Args:
            messages: mappings with `role`, `content` and further fields for the template.
            add_generation_prompt: open the assistant's turn at the end.
            continue_final_message: leave the turn of the last message open instead.
            tools: offered functions, in the form {"type": "function", "function": {…}}.
            documents: documents for the answer, mappings with `title` and `text`.
            variables: further variables of the template, such as `date_string`.
            images: images of the messages' parts, in order.
            rewrite: changes the rendered text; its own words may be special tokens.

        Raises:
            InvalidRequest: the template does not accept a role, a variable or the conversation.
        """
        self._check_has_template()
        _check(messages, add_generation_prompt, continue_final_message)
        chosen = self._templates.choose(messages, tools=bool(tools), documents=bool(documents))
        self._check_shown(chosen, messages, tools)
        extra = dict(variables or {})
        self._check_variables(chosen.template, extra, documents)
        guard = self.tokenizer.guard
        texts = strings([*messages, *tools, *documents, extra])
        mark = guard.choose([*texts, chosen.template.source])
        marked = [
            {**guard.mark_all(message, mark), "role": message["role"]} for message in messages
        ]
        end_mark = mark + mark
        spaces = _mark_end(marked[-1], end_mark) if continue_final_message else ""
        template_variables = {
            **guard.mark_all(extra, mark),
            **self._tokens,
            **chosen.forms.absent,
            "messages": [chosen.forms.convert(message) for message in marked],
            "add_generation_prompt": add_generation_prompt,
        }
        if tools:
            template_variables["tools"] = guard.mark_all(list(tools), mark)
        if documents:
            template_variables["documents"] = guard.mark_all(list(documents), mark)
        try:
            rendered = _render(chosen.template, template_variables)
        except TemplateError as error:  # the error may quote marked text
            raise TemplateError(str(error).replace(mark, "")) from None
        chosen.check_words(template_variables, rendered, self._model)
        if rewrite is not None:
            rendered = rewrite(rendered)
        if continue_final_message:
            rendered = _cut_at_end(rendered, end_mark, spaces)
        ids = self.tokenizer.encode_pieces(guard.split(rendered, mark))
        self._with_rows("messages", ids)
        return self._with_images(ids, images) if images else ids

    def _with_rows(self, field: str, ids: list[int]) -> list[int]:
        """`ids` after a check: a tokenizer may have more tokens than the model has rows.

        Raises:
            InvalidRequest: the model has no row for an id.
        """
        if self.tokenizer.size > self._vocab_size and max(ids, default=0) >= self._vocab_size:
            token = next(index for index in ids if index >= self._vocab_size)
            text = self.tokenizer.decode([token], skip_special=False)
            raise InvalidRequest(
                field,
                f"`{field}` has {text[:64]!r}, token {token} of the tokenizer, but model "
                f"{self._model!r} has rows for tokens 0 to {self._vocab_size - 1} only; leave the "
                "text out",
            )
        return ids

    def _check_has_template(self) -> None:
        if not self._templates:
            raise InvalidRequest(
                "messages",
                f"model {self._model!r} has no chat template; write the whole prompt yourself and "
                "call Generate",
            )

    def _check_shown(
        self,
        chosen: ProbedTemplate,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        """Refuse functions and calls that the template leaves out."""
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
                    f"`messages[{number}].tool_calls` to the model; describe the calls in "
                    "`content`",
                )

    def _with_images(self, ids: Sequence[int], images: Sequence[PromptImage]) -> list[int]:
        """`ids` with the tokens of each image instead of the template's image token."""
        image_token = self.images.image_token
        if ids.count(image_token) != len(images):
            raise InvalidRequest(
                "messages",
                f"the chat template of model {self._model!r} writes {ids.count(image_token)} image "
                f"tokens for {len(images)} images; send text alone",
            )
        remaining = iter(images)
        with_images: list[int] = []
        for token in ids:
            if token == image_token:
                with_images += next(remaining).tokens
            else:
                with_images.append(token)
        return with_images

    def _check_variables(
        self,
        template: ChatTemplate,
        variables: Mapping[str, Any],
        documents: Sequence[Mapping[str, Any]],
    ) -> None:
        """Refuse variables that the template ignores, and variables with separate fields."""
        if documents and not template.reads("documents"):
            raise InvalidRequest(
                "documents",
                f"the chat template of model {self._model!r} cannot show documents to the model; "
                "put the documents into a message",
            )
        for name in variables:
            if name in RESERVED:
                raise InvalidRequest(
                    "template_variables",
                    f"`template_variables.{name}` has a field of its own in the request; use that "
                    "field",
                )
            if not template.reads(name) and name not in REASONING:
                raise InvalidRequest(
                    "template_variables",
                    f"the chat template of model {self._model!r} does not read "
                    f"{name[:64]!r}; leave it out of `template_variables`",
                )


def _mark_end(message: dict[str, Any], end_mark: str) -> str:
    """Put `end_mark` after the words of a message; gives the spaces after these words."""
    content = message["content"]
    if not isinstance(content, str):
        raise InvalidRequest(
            "continue_final_message",
            "`continue_final_message` continues text, but the final message has an image; send the "
            "final message as text",
        )
    words = content.rstrip()
    spaces = content[len(words) :]
    message["content"] = words + end_mark + spaces
    return spaces


def _cut_at_end(rendered: str, end_mark: str, spaces: str) -> str:
    """The rendered text up to `end_mark`, and the spaces if the template kept the spaces."""
    end = rendered.rfind(end_mark)
    if end < 0:
        raise TemplateError(
            "the chat template leaves the final message out; leave `continue_final_message` out"
        )
    return rendered[:end] + (spaces if rendered.startswith(spaces, end + len(end_mark)) else "")


def _render(template: ChatTemplate, variables: Mapping[str, Any]) -> str:
    """The conversation as text, also with a call whose arguments are no JSON object.

    Most templates print the arguments. Templates that loop over the names of arguments get the
    whole text as a single argument, so that a malformed call does not end the conversation.
    """
    try:
        return template.render(variables)
    except TemplateError:
        messages = [_with_objects(message) for message in variables["messages"]]
        if messages == variables["messages"]:
            raise
        return template.render({**variables, "messages": messages})


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = message.get("tool_calls", ())
    if not any(isinstance(call["function"]["arguments"], str) for call in calls):
        return message
    new_calls = []
    for call in calls:
        function = call["function"]
        if isinstance(function["arguments"], str):
            function = {**function, "arguments": {"arguments": function["arguments"]}}
        new_calls.append({**call, "function": function})
    return {**message, "tool_calls": new_calls}


def _check(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, continue_final: bool
) -> None:
    if not messages:
        raise InvalidRequest("messages", "`messages` is empty; send at least one message")
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
            "`continue_final_message` and `add_generation_prompt` exclude each other; set only one",
        )
