"""Ray's label selectors: "value", "!value", "in(a, b)" and "!in(a, b)".

Knows the four forms and how labels of a node answer them; knows nothing of placements. Source:
Ray's documentation of `label_selector`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_FORM = re.compile(rf"(!?)(?:in\(({_VALUE}(?:, ?{_VALUE})*)\)|({_VALUE}))")


def label_selector(selector: str) -> str:
    """The selector itself, for a field of the spec; refuses what Ray cannot read.

    Raises:
        ValueError: tells the four forms.
    """
    if _FORM.fullmatch(selector) is None:
        raise ValueError(
            f"{selector!r} is not a label selector; write value, !value, in(a,b) or !in(a,b)"
        )
    return selector


def node_matches(selectors: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels fits all selectors; a label that is absent has no value."""
    return all(_fits(selector, labels.get(name)) for name, selector in selectors.items())


def _fits(selector: str, label: str | None) -> bool:
    form = _FORM.fullmatch(selector)
    if form is None:
        return False
    negated, several, single = form.groups()
    values = re.split(r", ?", several) if several else [single]
    return (label in values) != bool(negated)
