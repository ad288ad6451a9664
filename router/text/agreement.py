"""Checks that the text files of a checkpoint agree: chat template, tokenizer and end tokens.

The checks run before the first request, on the result of a probe conversation. A fault that would
spoil every conversation is refused with file, value and remedy; a fault that may be intended is a
warning. Knows the card and the probes of a model; knows nothing of requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from arriero.router.text.model_card import ModelCard
from arriero.router.text.template_forms import TemplateForms
from arriero.router.text.tokenizer import Tokenizer
from arriero.router.text.turn_ends import turn_end
from arriero.shards.errors import CheckpointError

_MARKUP = re.compile(r"<\|[\w ]{1,64}\|>")
_TEMPLATE_FILES = "chat template (chat_template.jinja, chat_template.json or tokenizer_config.json)"


def check_tokens_agree(card: ModelCard, tokenizer: Tokenizer) -> list[str]:
    """Warnings about tokenizer.json beside config.json and the other files."""
    warnings = []
    for field, text in (("bos_token", card.bos_token), ("eos_token", card.eos_token)):
        if text and tokenizer.token_id(text) is None:
            warnings.append(
                f"tokenizer_config.json: `{field}`={text!r} is no token of tokenizer.json, so the "
                "model sees plain text; take both files from the same checkpoint"
            )
    if tokenizer.size > card.vocab_size:
        first = tokenizer.vocabulary.pieces[card.vocab_size].decode(errors="replace")
        warnings.append(
            f"tokenizer.json: has {tokenizer.size} tokens, but config.json has `vocab_size`="
            f"{card.vocab_size}: the model has no row for {first!r} and the tokens after it; a "
            "prompt with such a token is refused, and the model never generates one; take both "
            "files from the same checkpoint"
        )
    if not card.eos_token_ids:
        warnings.append(
            "config.json, generation_config.json and tokenizer_config.json name no end token, and "
            "no chat template shows one: every output runs to its `max_tokens`; set `eos_token_id` "
            "in generation_config.json"
        )
    return warnings


def check_template_agrees(
    card: ModelCard, tokenizer: Tokenizer, forms: TemplateForms, name: str
) -> list[str]:
    """Warnings about a template.

    Args:
        card: gives vocabulary and end tokens.
        tokenizer: gives special tokens.
        forms: result of the template's probe.
        name: name of the template, among several.

    Raises:
        CheckpointError: the template leaves the words of a user out, or writes a token without a
            row in the model.
    """
    where = f"{_TEMPLATE_FILES} {name!r}"
    if "user" in forms.omitted:
        raise CheckpointError(
            f"{where}: leaves a user's words out, both as text and as a list of parts; write "
            "`messages[…].content` into the template"
        )
    controls = tokenizer.control_ids
    rowless = [
        f"{text!r} (id {index})"
        for text, index in controls.items()
        if index >= card.vocab_size and text in forms.written
    ]
    if rowless:
        raise CheckpointError(
            f"{where}: writes {', '.join(rowless)[:200]}, but config.json has `vocab_size`="
            f"{card.vocab_size}, so the model has no row for the token; resize the embedding "
            "(resize_token_embeddings), or take the template of the base model"
        )
    return [f"{where}: {words}" for words in _template_warnings(card, tokenizer, forms)]


def _template_warnings(
    card: ModelCard, tokenizer: Tokenizer, forms: TemplateForms
) -> Iterator[str]:
    for role in ("user", "system", "assistant"):
        if role in forms.refused:
            yield (
                f"refuses a plain message of role {role!r}: {forms.refused[role][:200]}; send no "
                "messages of this role"
            )
        elif role in forms.omitted:
            yield (
                f"leaves out messages of role {role!r}, so requests with such a message are "
                "refused; write their `content` into the template"
            )
    if forms.shows_tools and not forms.shows_calls:
        yield (
            "shows tools but no earlier calls, so requests with `tool_calls` are refused; write "
            "`tool_calls` into the template"
        )
    controls = tokenizer.control_ids
    texts = {text for text in _MARKUP.findall(forms.written) if text not in controls}
    if texts:
        yield (
            f"writes {', '.join(sorted(texts))[:200]}, which is no token of tokenizer.json, so the "
            "model sees plain text; if the text ends a turn, send it as a `stop`"
        )
    if forms.ignores_prompt:
        yield (
            "ignores `add_generation_prompt`, so the model must write the head of its turn itself; "
            "add {% if add_generation_prompt %} to the template"
        )
    if "user" in forms.refused or "assistant" in forms.omitted | forms.refused.keys():
        return
    end = turn_end(forms, dict.fromkeys(controls, True), card.bos_token)
    ends = {text for text, index in controls.items() if index in card.eos_token_ids}
    if not end:
        yield "ends an assistant's turn with no special token; send a `stop` that ends the turn"
    elif not any(text in forms.after_turn[0] + forms.after_turn[1] for text in ends):
        yield (
            f"ends an assistant's turn with {end!r}, which is none of the model's end tokens; add "
            "its id to `eos_token_id` in generation_config.json"
        )
