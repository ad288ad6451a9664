"""JSON calls: `{"name": …, "parameters": {…}}` in the spellings that Llama models use."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from arriero.router.tools.events import ToolCall

KEYS = ("name", "type", "function", "parameters", "arguments")
"""A call's object begins with one of these; any other object is content from its first key on."""


def parse_object(text: str) -> ToolCall:
    """The call of one JSON object.

    Raises:
        ValueError: it is something else.
    """
    return _call(_load(text))


def parse_list(text: str) -> list[ToolCall]:
    """The calls of a JSON list of such objects, at least one.

    Raises:
        ValueError: it is something else.
    """
    items = _load(text)
    if not isinstance(items, list) or not items:
        raise ValueError("no list of calls")
    return [_call(item) for item in items]


def parse_arguments(text: str) -> dict[str, Any]:
    """A JSON object of arguments.

    Raises:
        ValueError: it is something else.
    """
    found = _load(text)
    if not isinstance(found, dict):
        raise ValueError("arguments that are no object")
    return found


def _call(item: Any) -> ToolCall:  # noqa: ANN401
    if not isinstance(item, dict):
        raise ValueError("no object")
    if item.get("type", "function") != "function":
        raise ValueError("an object of another type")
    inner = item.get("function")
    if isinstance(inner, dict):
        item = inner
    name = item.get("name", inner if isinstance(inner, str) else None)
    if not isinstance(name, str) or not name:
        raise ValueError("no name")
    arguments = item.get("parameters", item.get("arguments"))
    if arguments is None and item.keys() <= {"name", "type", "function"}:
        arguments = {}
    if isinstance(arguments, str):
        arguments = parse_arguments(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments that are no object")
    return ToolCall.make(name, arguments)


def _load(text: str) -> Any:  # noqa: ANN401
    try:
        # Not strict: models put bare line ends into strings.
        return json.loads(text, strict=False, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
