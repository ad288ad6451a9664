"""The values that `ToolCallParser` gives: content, calls, and calls that were cut off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader, outside of calls."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call.

    Attributes:
        name: name of the tool.
        arguments: JSON object as text.
    """

    name: str
    arguments: str

    @classmethod
    def make(cls, name: str, arguments: Mapping[str, Any]) -> ToolCall:
        """A call with `arguments` as JSON text.

        Raises:
            ValueError: JSON has no form for a value (infinity).
        """
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write in UTF-8
            text = json.dumps(arguments, allow_nan=False)
        return cls(name, text)


@dataclass(frozen=True, slots=True)
class Truncated:
    """A call that the end of the output cut off, with the text so far."""

    text: str


Event = Content | ToolCall | Truncated
