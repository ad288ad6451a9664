"""The chat templates of a model: the choice for a conversation, and a check for missing words.

Knows templates by name and their forms; knows nothing of marks or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.router.text.agreement import check_template_agrees
from arriero.router.text.chat_template import ChatTemplate, TemplateError
from arriero.router.text.model_card import ModelCard
from arriero.router.text.template_forms import TemplateForms, as_parts, probe
from arriero.router.text.text_files import DEFAULT
from arriero.router.text.tokenizer import Tokenizer
from arriero.shards.errors import CheckpointError, InvalidRequest

TOOL_USE = "tool_use"
RAG = "rag"

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ProbedTemplate:
    """A template with the forms of its messages."""

    template: ChatTemplate
    forms: TemplateForms

    def check_words(self, variables: Mapping[str, Any], rendered: str, model: str) -> None:
        """Refuse a conversation when the template left words of a message out.

        A template may change words (trim, escape, drop a thought). Where the rendered text lacks
        the text of a message, the conversation is rendered again with plain words instead of it.

        Args:
            variables: variables of the template, messages in the template's form.
            rendered: output of the template for these variables.
            model: name of the model for an error.

        Raises:
            InvalidRequest: words of a message would not reach the model.
        """
        missing = _missing_messages(variables["messages"], rendered)
        if not missing:
            return
        stem = "arrieroprobe"
        while stem in rendered:
            stem += "x"
        messages = list(variables["messages"])
        for number in missing:
            word = f"{stem}{number}end"
            content = messages[number]["content"]
            content = word if isinstance(content, str) else as_parts(word)
            messages[number] = {**messages[number], "content": content}
        try:
            again = self.template.render({**variables, "messages": messages})
        except TemplateError:
            return  # the template depends on the words, so the check has no result
        for number in missing:
            if f"{stem}{number}end" not in again:
                role = messages[number]["role"]
                raise InvalidRequest(
                    "messages",
                    f"the chat template of model {model!r} leaves out `messages[{number}]` (role "
                    f"{role!r}), so its words would not reach the model; put the words into a "
                    "message that the template shows, such as the user's",
                )


class ChatTemplates:
    """The templates of one model; safe to use from several threads at once.

    Args:
        card: gives the templates.
        tokenizer: tokenizer of the card.

    Raises:
        CheckpointError: a template does not compile, or does not agree with the other files.

    Attributes:
        warnings: a sentence for each oddity of the templates.
    """

    def __init__(self, card: ModelCard, tokenizer: Tokenizer) -> None:
        self.warnings: list[str] = []
        self._named: dict[str, ProbedTemplate] = {}
        sources = {DEFAULT: card.chat_template, **card.named_templates}
        for name, source in sources.items():
            if not source:
                continue
            try:
                template = ChatTemplate(source)
            except CheckpointError as error:
                raise CheckpointError(f"{error} (chat template {name!r})") from error
            forms = probe(template, card.template_tokens)
            self.warnings += check_template_agrees(card, tokenizer, forms, name)
            self._named[name] = ProbedTemplate(template, forms)

    def __bool__(self) -> bool:
        return bool(self._named)

    def choose(
        self, messages: Sequence[Message], *, tools: bool, documents: bool
    ) -> ProbedTemplate:
        """The template for a conversation; the template for tools or documents where one exists.

        Args:
            messages: the conversation.
            tools: whether the request offers functions.
            documents: whether the request has documents.
        """
        default = self._named[DEFAULT]
        for_tools = self._named.get(TOOL_USE, default)
        if tools:
            return for_tools
        if not default.forms.shows_calls and any(message.get("tool_calls") for message in messages):
            return for_tools
        if documents and not default.template.reads("documents"):
            return self._named.get(RAG, default)
        return default


def _missing_messages(messages: Sequence[Message], rendered: str) -> list[int]:
    """Numbers of messages with a text that `rendered` lacks.

    Words beside calls do not count: Llama's own templates show the calls alone.
    """
    missing = []
    at = 0
    for number, message in enumerate(messages):
        content = message.get("content")
        if not content or message.get("tool_calls"):
            continue
        parts = [{"text": content}] if isinstance(content, str) else content
        for part in parts:
            text = str(part.get("text", "")).strip()
            if not text:
                continue
            start = rendered.find(text, at)
            if start < 0:
                start = rendered.find(text)
            if start < 0:
                missing.append(number)
                break
            at = start
    return missing
