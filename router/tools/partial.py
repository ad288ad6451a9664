"""The certain part of calls that the end of the output cut off.

A call with a complete name is given with the arguments so far, as JSON without the end. Knows the
texts of calls in each form; knows nothing of the marks around calls.
"""

from __future__ import annotations

import json

from arriero.router.tools import json_calls, pythonic
from arriero.router.tools.beginning import skip
from arriero.router.tools.events import ToolCall
from arriero.router.tools.forms import HEADS

_DECODER = json.JSONDecoder(strict=False)


def complete_calls(text: str) -> tuple[list[ToolCall], str]:
    """The complete calls of a list that was cut off, and the text after these calls.

    Args:
        text: text of a list or of a call, in JSON or Python.
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
    """The call at the beginning of `text`; None while the name is not complete.

    The `arguments` are the beginning of a JSON object, or empty.
    """
    for head in HEADS:
        match = head.pattern.match(text)
        if match is not None and match[1] and text.startswith("{", match.end()):
            return ToolCall(match[1], text[match.end() :])
    if not text.startswith("{"):
        return pythonic.partial_call(text)
    fields = _fields(text)
    if fields.get("function", "").startswith("{"):
        fields = _fields(fields["function"])
    name = _string(json_calls.first_of(fields, (*json_calls.NAMES, "function")))
    if not name:
        return None
    arguments = json_calls.first_of(fields, json_calls.ARGUMENTS) or ""
    if arguments.startswith('"'):  # an object within a string
        arguments = _string(arguments, whole=False) or ""
    return ToolCall(name, arguments if arguments.startswith("{") else "")


def _fields(text: str) -> dict[str, str]:
    """The fields of a JSON object that was cut off, as texts; the last text may be incomplete."""
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
    """Value of the JSON string in `text`; without `whole`, also of a string that was cut off."""
    text = text or ""
    tails = ("",) if whole else ("", '"')
    # The cut may be within an escape, after at most 5 of its characters.
    for dropped in range(1 if whole else 6):
        for tail in tails:
            try:
                value = json.loads(text[: len(text) - dropped] + tail, strict=False)
            except ValueError:
                continue
            return value if isinstance(value, str) else None
    return None
