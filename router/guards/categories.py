"""Hazard categories: Meta's codes and names, and the categories of the OpenAI API.

Knows names; knows nothing of prompts and models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from arriero.shards.errors import InvalidRequest

NAMES: Mapping[str, str] = {
    "S1": "Violent Crimes",
    "S2": "Non-Violent Crimes",
    "S3": "Sex Crimes",
    "S4": "Child Exploitation",
    "S5": "Defamation",
    "S6": "Specialized Advice",
    "S7": "Privacy",
    "S8": "Intellectual Property",
    "S9": "Indiscriminate Weapons",
    "S10": "Hate",
    "S11": "Self-Harm",
    "S12": "Sexual Content",
    "S13": "Elections",
    "S14": "Code Interpreter Abuse",
}
"""Meta's taxonomy (MLCommons and two more), by code."""

OPENAI = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""Categories of OpenAI's moderations; clients expect all of them."""

_OPENAI_OF_CODE: Mapping[str, tuple[str, ...]] = {
    "S1": ("violence", "illicit/violent"),
    "S2": ("illicit",),
    "S3": ("sexual", "illicit"),
    "S4": ("sexual/minors",),
    "S5": ("harassment",),
    "S9": ("illicit/violent",),
    "S10": ("hate",),
    "S11": ("self-harm",),
    "S12": ("sexual",),
    "S14": ("illicit",),
}
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
MAX_CATEGORIES = 64
MAX_NAME_CHARS = 2000


def default_codes(guard_kind: str) -> tuple[str, ...]:
    """Codes that a guard was trained on.

    Args:
        guard_kind: such as "llama-guard-3"; the small and the multimodal guards have no S14.
    """
    codes = tuple(NAMES)
    return codes if guard_kind == "llama-guard-3" else codes[:-1]


def with_names(categories: Mapping[str, str]) -> dict[str, str]:
    """Categories with a name each; an empty name becomes Meta's name of the code.

    Raises:
        InvalidRequest: too many categories, a malformed code, or a name that is missing, too long
            or that holds marks of special tokens.
    """
    if len(categories) > MAX_CATEGORIES:
        raise InvalidRequest(
            "categories",
            f"`categories` has {len(categories)} entries; the limit is {MAX_CATEGORIES}; give "
            "fewer",
        )
    named = {}
    for code, text in categories.items():
        if not _CODE.fullmatch(code):
            raise InvalidRequest(
                "categories",
                f"`categories` has the code {code[:64]!r}; a code is a letter, then at most 31 "
                "letters, digits, dashes or underscores",
            )
        name = text.strip().removesuffix(".") or NAMES.get(code, "")
        if not name or len(name) > MAX_NAME_CHARS or "<|" in name or "<END" in name:
            raise InvalidRequest(
                "categories",
                f"`categories.{code}`={name[:64]!r} must be a text of 1 to {MAX_NAME_CHARS} "
                "characters without special tokens; only S1 to S14 have a text of their own",
            )
        named[code] = name
    return named


def openai_categories(code: str) -> tuple[str, ...]:
    """OpenAI's categories for a code; the code's own name where OpenAI has none."""
    if code in _OPENAI_OF_CODE:
        return _OPENAI_OF_CODE[code]
    return (NAMES[code].lower().replace(" ", "-"),) if code in NAMES else (code,)
