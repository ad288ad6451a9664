"""JSON calls: `{"name": …, "parameters": {…}}` in the spellings that models use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from arriero.router.tools.events import ToolCall

NAMES = ("name", "tool_name", "tool", "function_name")
ARGUMENTS = ("parameters", "arguments", "args", "input", "tool_input", "tool_arguments")
KEYS = ("type", "function", "id", *NAMES, *ARGUMENTS)
"""A call's object begins with one of these; any other object is content from its first key on."""
TYPES = ("function", "tool_use", "tool_call", "function_call")


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


def first_of(item: Mapping[str, Any], keys: tuple[str, ...]) -> Any:  # noqa: ANN401
    """The value of the first of `keys` that `item` has; None without any."""
    return next((item[key] for key in keys if key in item), None)


def _call(item: Any) -> ToolCall:  # noqa: ANN401
    if not isinstance(item, dict):
        raise ValueError("no object")
    if item.get("type", "function") not in TYPES:
        raise ValueError("an object of another type")
    inner = item.get("function")
    if isinstance(inner, dict):
        item = inner
    name = first_of(item, NAMES)
    if name is None and isinstance(inner, str):
        name = inner
    if not isinstance(name, str) or not name:
        raise ValueError("no name")
    arguments = first_of(item, ARGUMENTS)
    if arguments is None and item.keys() <= {*NAMES, "type", "function", "id", *ARGUMENTS}:
        arguments = {}
    if isinstance(arguments, str):
        arguments = parse_arguments(arguments or "{}")
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
