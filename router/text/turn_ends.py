"""Tokens with which a chat template ends the assistant's turns: generation must stop at them.

A fine-tune may name no end token but its base model's, while its template ends each turn with a
token of its own, such as <|im_end|>. A probe conversation shows which. Knows what probes gave and
the tokenizer's special tokens; knows nothing of requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from arriero.router.text.chat_template import ChatTemplate
from arriero.router.text.template_forms import Forms, probe
from arriero.router.text.tokenizer import control_tokens
from arriero.shards.errors import CheckpointError

MESSAGE_END = "<|eom_id|>"
"""Ends a turn that calls a built-in tool, in templates that write it at all (Llama 3.1)."""


def turn_end(forms: Forms, controls: Mapping[str, bool], bos: str = "") -> str:
    """Text of the special token after the assistant's words; "" where there is none.

    Args:
        forms: what the template's probe found.
        controls: whether the tokenizer's file calls a control token special, by text; those that
            it does (<|im_end|>) go before mere markup (</answer>).
        bos: text of the begin token.
    """
    amid, last = forms.after_turn
    ends = _in_order(last, controls)
    shared = [one for one in ends if not amid or one in amid]
    if not ends:  # the last turn is left open, and what follows may be the user's own head
        head = forms.before_user.lstrip().removeprefix(bos).lstrip()
        shared = [one for one in _in_order(amid, controls)[:1] if not head.startswith(one)]
    return next((one for one in shared if controls[one]), next(iter(shared), ""))


def turn_ends(
    templates: Iterable[str | None], tokens: Mapping[str, str], tokenizer_json: bytes
) -> tuple[int, ...]:
    """Ids of all such tokens of a checkpoint's templates.

    Args:
        templates: Jinja sources.
        tokens: the special tokens' text that templates ask for, by variable.
        tokenizer_json: the file's bytes.
    """
    controls = _controls(tokenizer_json)
    ends: list[int] = []
    for source in templates:
        if not source or not controls:
            continue
        try:
            forms = probe(ChatTemplate(source), tokens)
        except CheckpointError:
            continue  # the text model says what is wrong with it
        special = {text: special for text, (_, special) in controls.items()}
        if text := turn_end(forms, special, tokens.get("bos_token", "")):
            ends.append(controls[text][0])
        if MESSAGE_END in source and MESSAGE_END in controls:
            ends.append(controls[MESSAGE_END][0])
    return tuple(dict.fromkeys(ends))


def _in_order(text: str, controls: Iterable[str]) -> list[str]:
    """The special tokens in `text`, as they come; of those at one place the longest."""
    either = "|".join(map(re.escape, sorted(controls, key=len, reverse=True)))
    return re.findall(either, text) if either else []


def _controls(tokenizer_json: bytes) -> dict[str, tuple[int, bool]]:
    """Id of each control token, and whether the file calls it special."""
    try:
        added = json.loads(tokenizer_json).get("added_tokens") or []
        return {
            token["content"]: (token["id"], bool(token["special"]))
            for token in control_tokens(added)
        }
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {}  # the tokenizer's reader says what is wrong with it
