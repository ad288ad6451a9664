"""What is certain of calls that the output's end cut off.

A call whose name is whole is given with as much of its arguments as there is, as JSON that only
lacks its end. Knows the forms' own texts, without the marks around them.
"""

from __future__ import annotations

import json

from arriero.router.tools import json_calls, pythonic
from arriero.router.tools.beginning import skip
from arriero.router.tools.events import ToolCall
from arriero.router.tools.forms import HEADS

_DECODER = json.JSONDecoder(strict=False)


def complete_calls(text: str) -> tuple[list[ToolCall], str]:
    """The whole calls of a list that was cut off, and the text from the next one on.

    Args:
        text: of a list or of one call, in JSON or in Python.
    """
    if not text.startswith("["):
        return [], text
    at = skip(text, 1)
    if not text.startswith("{", at):
        return pythonic.complete_calls(text)
    calls: list[ToolCall] = []
    while text.startswith("{", at):
        try:
            _, end = _DECODER.raw_decode(text, at)
            calls.append(json_calls.parse_object(text[at:end]))
        except (ValueError, RecursionError):
            break
        at = skip(text, end)
        if not text.startswith(",", at):
            break
        at = skip(text, at + 1)
    return calls, text[at:]


def partial_call(text: str) -> ToolCall | None:
    """The call that `text` is the beginning of; None while its name is not whole.

    Its `arguments` are the beginning of a JSON object, or empty.
    """
    for head in HEADS:
        found = head.pattern.match(text)
        if found is not None and found[1] and text.startswith("{", found.end()):
            return ToolCall(found[1], text[found.end() :])
    if not text.startswith("{"):
        return pythonic.partial_call(text)
    fields = _fields(text)
    if fields.get("function", "").startswith("{"):
        fields = _fields(fields["function"])
    name = _string(json_calls.first_of(fields, (*json_calls.NAMES, "function")))
    if not name:
        return None
    given = json_calls.first_of(fields, json_calls.ARGUMENTS) or ""
    if given.startswith('"'):  # an object, written as a string
        given = _string(given, whole=False) or ""
    return ToolCall(name, given if given.startswith("{") else "")


def _fields(text: str) -> dict[str, str]:
    """The fields of a JSON object that was cut off: each one's own text, the last may be a part."""
    fields: dict[str, str] = {}
    at = skip(text, 1)
    try:
        while at < len(text):
            key, at = _DECODER.raw_decode(text, at)
            at = skip(text, at)
            if not isinstance(key, str) or not text.startswith(":", at):
                break
            at = skip(text, at + 1)
            fields[key] = text[at:]
            _, end = _DECODER.raw_decode(text, at)
            fields[key] = text[at:end]
            at = skip(text, end)
            if not text.startswith(",", at):
                break
            at = skip(text, at + 1)
    except (ValueError, RecursionError):
        pass
    return fields


def _string(text: str | None, *, whole: bool = True) -> str | None:
    """The JSON string in `text`; of one that was cut off, unless `whole`, as much as there is."""
    text = text or ""
    tails = ("",) if whole else ("", '"')
    # an escape may be cut in two, at most five characters of it
    for dropped in range(1 if whole else 6):
        for tail in tails:
            try:
                value = json.loads(text[: len(text) - dropped] + tail, strict=False)
            except ValueError:
                continue
            return value if isinstance(value, str) else None
    return None
