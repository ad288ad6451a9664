"""Tokens with which a chat template ends the assistant's turns, so that generation stops there.

A fine-tuned model may name only the end token of the base model, while the template ends each turn
with another token, such as <|im_end|>; a probe conversation shows this token. Knows the results of
probes and the tokenizer's special tokens; knows nothing of requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from arriero.router.text.chat_template import ChatTemplate
from arriero.router.text.template_forms import TemplateForms, probe
from arriero.router.text.tokenizer import control_tokens
from arriero.shards.errors import CheckpointError

MESSAGE_END = "<|eom_id|>"
"""End of a turn that calls a built-in tool, in templates of Llama 3.1."""


def turn_end(forms: TemplateForms, controls: Mapping[str, bool], bos: str = "") -> str:
    """Text of the special token after the assistant's words; "" without such a token.

    Args:
        forms: result of the template's probe.
        controls: whether tokenizer.json marks a control token as special, by text; special tokens
            (<|im_end|>) come before mere markup (</answer>).
        bos: text of the begin token.
    """
    middle, last = forms.after_turn
    ends = _tokens_in(last, controls)
    shared = [end for end in ends if not middle or end in middle]
    if not ends:  # the last turn stays open, and the next token may be the head of the user's turn
        head = forms.before_user.lstrip().removeprefix(bos).lstrip()
        shared = [end for end in _tokens_in(middle, controls)[:1] if not head.startswith(end)]
    return next((end for end in shared if controls[end]), next(iter(shared), ""))


def turn_ends(
    templates: Iterable[str | None], tokens: Mapping[str, str], tokenizer_json: bytes
) -> tuple[int, ...]:
    """Ids of the tokens that end turns in a checkpoint's templates.

    Args:
        templates: Jinja sources.
        tokens: text of the special tokens, by variable of the templates.
        tokenizer_json: bytes of the file.
    """
    controls = _controls(tokenizer_json)
    ends: list[int] = []
    for source in templates:
        if not source or not controls:
            continue
        try:
            forms = probe(ChatTemplate(source), tokens)
        except CheckpointError:
            continue  # `TextModel` reports the error
        special = {text: special for text, (_, special) in controls.items()}
        if text := turn_end(forms, special, tokens.get("bos_token", "")):
            ends.append(controls[text][0])
        if MESSAGE_END in source and MESSAGE_END in controls:
            ends.append(controls[MESSAGE_END][0])
    return tuple(dict.fromkeys(ends))


def _tokens_in(text: str, controls: Iterable[str]) -> list[str]:
    """The special tokens in `text`, in order; the longest where several begin."""
    either = "|".join(map(re.escape, sorted(controls, key=len, reverse=True)))
    return re.findall(either, text) if either else []


def _controls(tokenizer_json: bytes) -> dict[str, tuple[int, bool]]:
    """Id of each control token, and whether tokenizer.json marks the token as special."""
    try:
        added = json.loads(tokenizer_json).get("added_tokens") or []
        return {
            token["content"]: (token["id"], bool(token["special"]))
            for token in control_tokens(added)
        }
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {}  # `Tokenizer` reports the error
