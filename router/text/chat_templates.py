"""A model's chat templates: which one a conversation takes, and whether all words came out of it.

Knows templates by name and their forms; knows nothing of marks or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.router.text.agreement import check_template_agrees
from arriero.router.text.chat_template import ChatTemplate, TemplateError
from arriero.router.text.model_card import ModelCard
from arriero.router.text.template_forms import Forms, as_parts, probe
from arriero.router.text.text_files import DEFAULT
from arriero.router.text.tokenizer import Tokenizer
from arriero.shards.errors import CheckpointError, InvalidRequest

TOOL_USE = "tool_use"
RAG = "rag"

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ProbedTemplate:
    """A template, and the forms in which it takes messages."""

    template: ChatTemplate
    forms: Forms

    def check_words(self, given: Mapping[str, Any], rendered: str, model: str) -> None:
        """Refuse a conversation of which the template left words out.

        A template may change words (trim, escape, drop a thought), so where a text is not found as
        it was given, the conversation is laid out once more with plain words in its place.

        Args:
            given: the variables of the template, messages in its own form.
            rendered: what it made of them.
            model: what an error names.

        Raises:
            InvalidRequest: words of a message would not reach the model.
        """
        missing = _missing(given["messages"], rendered)
        if not missing:
            return
        stem = "arrieroprobe"
        while stem in rendered:
            stem += "x"
        messages = list(given["messages"])
        for number in missing:
            word = f"{stem}{number}end"
            content = messages[number]["content"]
            laid = word if isinstance(content, str) else as_parts(word)
            messages[number] = {**messages[number], "content": laid}
        try:
            again = self.template.render({**given, "messages": messages})
        except TemplateError:
            return  # it reads what the messages say, so nothing is known
        for number in missing:
            if f"{stem}{number}end" not in again:
                role = messages[number]["role"]
                raise InvalidRequest(
                    "messages",
                    f"the chat template of model {model!r} leaves out `messages[{number}]` (role "
                    f"{role!r}), whose words would not reach the model; put them into a message "
                    "that it shows, such as the user's",
                )


class ChatTemplates:
    """The templates of one model; safe to use from several threads at once.

    Args:
        card: gives the templates.
        tokenizer: the card's.

    Raises:
        CheckpointError: a template does not compile, or does not agree with the other files.

    Attributes:
        warnings: what is odd about them, in words.
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
        """The template for a conversation: that for tools or documents where there is one.

        Args:
            messages: the conversation.
            tools: whether functions are on offer.
            documents: whether there are texts to answer from.
        """
        default = self._named[DEFAULT]
        for_tools = self._named.get(TOOL_USE, default)
        if tools:
            return for_tools
        if not default.forms.shows_calls and any(one.get("tool_calls") for one in messages):
            return for_tools
        if documents and not default.template.reads("documents"):
            return self._named.get(RAG, default)
        return default


def _missing(messages: Sequence[Message], rendered: str) -> list[int]:
    """Numbers of messages with a text that does not stand in `rendered`.

    Words beside calls are not looked for: Llama's own templates show the calls alone.
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
            place = rendered.find(text, at)
            if place < 0:
                place = rendered.find(text)
            if place < 0:
                missing.append(number)
                break
            at = place
    return missing
