"""What a model's text turns out to be, piece by piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Content:
    """Words for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call.

    Attributes:
        name: the tool.
        arguments: a JSON object.
    """

    name: str
    arguments: str

    @classmethod
    def make(cls, name: str, arguments: Mapping[str, Any]) -> ToolCall:
        """With `arguments` written as JSON.

        Raises:
            ValueError: a value that JSON has no word for (infinity).
        """
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair: only its escape is UTF-8
            text = json.dumps(arguments, allow_nan=False)
        return cls(name, text)


@dataclass(frozen=True, slots=True)
class Truncated:
    """A call that the output's end cut off; the text is what there is of it."""

    text: str


Event = Content | ToolCall | Truncated
