"""Llama Guard's prompt for a conversation.

A guard's own chat template makes the prompt from the conversation; it is applied once. For a guard
with a plain chat template the prompt is built here and is the only message of the user. The form is
Meta's: task, categories, conversation, instructions; the judged role is User or Agent. Knows texts;
knows nothing of tokens and groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arriero.router.guards.conversation import Turn
from arriero.router.text.guard_template import BEGIN, END
from arriero.shards.errors import CheckpointError

_ROLES = {"user": "User", "assistant": "Agent"}


def category_lines(categories: Mapping[str, str]) -> str:
    """A line for each category, without a line break at the end."""
    return "\n".join(f"{code}: {name}." for code, name in categories.items())


def build_prompt(turns: Sequence[Turn], categories: Mapping[str, str]) -> str:
    """The prompt that judges the last turn.

    Args:
        turns: the conversation, at least one turn.
        categories: names by code.
    """
    role = _ROLES[turns[-1].role]
    said = "\n\n".join(f"{_ROLES[turn.role]}: {turn.text}" for turn in turns)
    return (
        f"Task: Check if there is unsafe content in '{role}' messages in conversations according "
        "our safety policy with the below categories.\n\n"
        f"{BEGIN}{category_lines(categories)}\n{END}\n\n"
        f"<BEGIN CONVERSATION>\n\n{said}\n\n<END CONVERSATION>\n\n"
        f"Provide your safety assessment for ONLY THE LAST {role} message in the above "
        "conversation:\n"
        " - First line must read 'safe' or 'unsafe'.\n"
        " - If unsafe, a second line must include a comma-separated list of violated categories."
    )


def replace_categories(rendered: str, categories: Mapping[str, str]) -> str:
    """The output of a guard's own template with other categories.

    The template writes its categories before the conversation, so the first marks are the
    template's own, whatever the conversation holds.

    Raises:
        CheckpointError: the template wrote no list of categories.
    """
    before, begin, rest = rendered.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise CheckpointError(
            f"the guard's chat template wrote no {BEGIN.strip()} before {END}; `categories` cannot "
            "be replaced; leave `categories` out"
        )
    return f"{before}{begin}{category_lines(categories)}\n{end}{after}"
