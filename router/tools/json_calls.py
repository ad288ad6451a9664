"""JSON calls: `{"name": …, "parameters": {…}}` in all spellings of models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from arriero.router.tools.events import ToolCall

NAMES = ("name", "tool_name", "tool", "function_name")
ARGUMENTS = ("parameters", "arguments", "args", "input", "tool_input", "tool_arguments")
KEYS = ("type", "function", "id", *NAMES, *ARGUMENTS)
"""Possible first keys of a call's object; an object with another first key is content."""
TYPES = ("function", "tool_use", "tool_call", "function_call")


def parse_object(text: str) -> ToolCall:
    """The call of a JSON object.

    Raises:
        ValueError: the text is no call.
    """
    return _call(_load(text))


def parse_list(text: str) -> list[ToolCall]:
    """The calls of a JSON list of objects, at least one call.

    Raises:
        ValueError: the text is no list of calls.
    """
    items = _load(text)
    if not isinstance(items, list) or not items:
        raise ValueError("the text is no list of calls")
    return [_call(item) for item in items]


def parse_arguments(text: str) -> dict[str, Any]:
    """The arguments of a JSON object.

    Raises:
        ValueError: the text is no JSON object.
    """
    arguments = _load(text)
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no JSON object")
    return arguments


def first_of(item: Mapping[str, Any], keys: tuple[str, ...]) -> Any:  # noqa: ANN401
    """The value of the first of `keys` in `item`; None without these keys."""
    return next((item[key] for key in keys if key in item), None)


def _call(item: Any) -> ToolCall:  # noqa: ANN401
    if not isinstance(item, dict):
        raise ValueError("the call is no JSON object")
    if item.get("type", "function") not in TYPES:
        raise ValueError("the object's `type` is not the type of a call")
    inner = item.get("function")
    if isinstance(inner, dict):
        item = inner
    name = first_of(item, NAMES)
    if name is None and isinstance(inner, str):
        name = inner
    if not isinstance(name, str) or not name:
        raise ValueError("the call has no name")
    arguments = first_of(item, ARGUMENTS)
    if arguments is None and item.keys() <= {*NAMES, "type", "function", "id", *ARGUMENTS}:
        arguments = {}
    if isinstance(arguments, str):
        arguments = parse_arguments(arguments or "{}")
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no JSON object")
    return ToolCall.make(name, arguments)


def _load(text: str) -> Any:  # noqa: ANN401
    try:
        # Not strict, because models put bare line breaks into strings.
        return json.loads(text, strict=False, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
