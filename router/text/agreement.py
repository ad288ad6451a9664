"""Whether a checkpoint's template, tokenizer and end tokens agree, seen before a request comes.

Looks at what a probe conversation gave. What would spoil every conversation is refused, with the
file, the value and a remedy; what may be meant so is a warning. Knows a model's card and probes;
knows nothing of requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from arriero.router.text.model_card import ModelCard
from arriero.router.text.template_forms import Forms
from arriero.router.text.tokenizer import Tokenizer
from arriero.router.text.turn_ends import turn_end
from arriero.shards.errors import CheckpointError

_MARKUP = re.compile(r"<\|[\w ]{1,64}\|>")
_WHERE = "chat template (chat_template.jinja, chat_template.json or tokenizer_config.json)"


def check_tokens_agree(card: ModelCard, tokenizer: Tokenizer) -> list[str]:
    """Warnings about tokenizer.json beside config.json and the other files."""
    warnings = []
    for field, text in (("bos_token", card.bos_token), ("eos_token", card.eos_token)):
        if text and tokenizer.token_id(text) is None:
            warnings.append(
                f"tokenizer_config.json: `{field}`={text!r} is no token of tokenizer.json, so it "
                "is plain text to the model; take both files from one checkpoint"
            )
    if tokenizer.size > card.vocab_size:
        first = tokenizer.vocabulary.pieces[card.vocab_size].decode(errors="replace")
        warnings.append(
            f"tokenizer.json: has {tokenizer.size} tokens and config.json `vocab_size`="
            f"{card.vocab_size}: {first!r} and those after it have no row; a prompt with one is "
            "refused, and none is ever drawn"
        )
    if not card.eos_token_ids:
        warnings.append(
            "config.json, generation_config.json and tokenizer_config.json name no end token, and "
            "no chat template shows one: every output runs to its `max_tokens`; set `eos_token_id`"
        )
    return warnings


def check_template_agrees(
    card: ModelCard, tokenizer: Tokenizer, forms: Forms, name: str
) -> list[str]:
    """Warnings about one template.

    Args:
        card: gives vocabulary and end tokens.
        tokenizer: gives special tokens.
        forms: what the template's probe found.
        name: of the template, among several.

    Raises:
        CheckpointError: it shows no words of a user, or writes a token that has no row.
    """
    where = f"{_WHERE} {name!r}"
    if "user" in forms.lost:
        raise CheckpointError(
            f"{where}: leaves a user's words out, given as text and given as a list of parts; "
            "write `messages[…].content` into it"
        )
    controls = tokenizer.control_ids
    rowless = [
        f"{text!r} (id {index})"
        for text, index in controls.items()
        if index >= card.vocab_size and text in forms.written
    ]
    if rowless:
        raise CheckpointError(
            f"{where}: writes {', '.join(rowless)[:200]}, and config.json has `vocab_size`="
            f"{card.vocab_size}: the model has no row for it; resize the embedding "
            "(resize_token_embeddings), or take the template of the model that it was made from"
        )
    return [f"{where}: {words}" for words in _template_warnings(card, tokenizer, forms)]


def _template_warnings(card: ModelCard, tokenizer: Tokenizer, forms: Forms) -> Iterator[str]:
    for role in ("user", "system", "assistant"):
        if role in forms.refused:
            yield f"refuses a plain message of role {role!r}: {forms.refused[role][:200]}"
        elif role in forms.lost:
            yield f"leaves out messages of role {role!r}; requests with one are refused"
    if forms.shows_tools and not forms.shows_calls:
        yield "shows tools and no earlier calls of them; requests with `tool_calls` are refused"
    controls = tokenizer.control_ids
    texts = {text for text in _MARKUP.findall(forms.written) if text not in controls}
    if texts:
        yield (
            f"writes {', '.join(sorted(texts))[:200]}, which is no token of tokenizer.json but "
            "plain text to the model; send it as a `stop` if it ends a turn"
        )
    if forms.ignores_prompt:
        yield (
            "ignores `add_generation_prompt`: the model must write the head of its turn itself; "
            "add {% if add_generation_prompt %}"
        )
    if "user" in forms.refused or "assistant" in forms.lost | forms.refused.keys():
        return
    end = turn_end(forms, dict.fromkeys(controls, True), card.bos_token)
    ends = {text for text, index in controls.items() if index in card.eos_token_ids}
    if not end:
        yield "ends an assistant's turn with no special token; send a `stop` that does"
    elif not any(text in forms.after_turn[0] + forms.after_turn[1] for text in ends):
        yield (
            f"ends an assistant's turn with {end!r}, which is none of the model's end tokens; add "
            "its id to `eos_token_id` in generation_config.json"
        )
