"""Chat templates of guard models: whether a template makes a guard's prompt, and of which kind.

Knows the marks in Meta's templates; knows nothing of prompts and verdicts.
"""

from __future__ import annotations

KINDS = ("llama-guard-3", "llama-guard-4")
"""Kinds of guards that a spec may name."""
BEGIN, END = "<BEGIN UNSAFE CONTENT CATEGORIES>\n", "<END UNSAFE CONTENT CATEGORIES>"
"""Marks around the categories."""


def has_guard_template(template: str | None) -> bool:
    """Whether a chat template makes a guard's prompt by itself."""
    return template is not None and BEGIN.strip() in template


def guard_kind(named: str, template: str | None) -> str:
    """Kind of a guard; "" for a model that is no guard.

    Args:
        named: kind in the model's spec; "" for none.
        template: chat template of the checkpoint.
    """
    if named or not has_guard_template(template):
        return named
    return KINDS[1] if template is not None and "<|header_start|>" in template else KINDS[0]
