"""A chat body made from the body of another API, with the names of that API for errors.

`/v1/messages` and `/v1/responses` are translated to a chat body, so that every check of
`/v1/chat/completions` holds for them too. Knows chat bodies; knows nothing of the other APIs but
the names that they give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from arriero.router.http import errors
from arriero.router.http.request_schemas import ChatBody
from arriero.shards.errors import InvalidRequest

Json = dict[str, Any]

_MESSAGE = re.compile(r"\bmessages\[(\d+)\]")


@dataclass(slots=True)
class Conversation:
    """The messages of a chat body, each with its path in the other API's body.

    Attributes:
        names: patterns of names in chat bodies, each with the other API's name.
        messages: entries of `ChatBody.messages`.
        paths: for each message, its path in the other API's body, such as "input[3]".
    """

    names: Sequence[tuple[re.Pattern[str], str]]
    messages: list[Json] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def add(self, path: str, **message: Any) -> Json:  # noqa: ANN401
        """Append a message; returns it.

        Args:
            path: path of the message in the other API's body.
            message: fields of `ChatMessage`.
        """
        self.messages.append(message)
        self.paths.append(path)
        return message

    def assistant(self, path: str) -> Json:
        """The last message if the assistant sent it, else a new message of the assistant."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[-1]
        return self.add(path, role="assistant")

    def chat_body(self, given: Mapping[str, Any]) -> ChatBody:
        """The chat body of the messages.

        Args:
            given: further fields of `ChatBody`; None leaves a field out.

        Raises:
            InvalidRequest: a field breaks its limit; with the names of the other API's body.
        """
        try:
            return ChatBody.model_validate({"messages": self.messages, **given})
        except ValidationError as error:
            first = errors.first(
                [{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors()]
            )
            field, text = self.renamed(first.field), self.renamed(str(first))
            raise InvalidRequest(field, text, first.code) from None

    def renamed(self, text: str) -> str:
        """A field or an error text with the names of the other API."""
        text = errors.chat_names(text)
        for pattern, replacement in self.names:
            text = pattern.sub(replacement, text)
        return _MESSAGE.sub(self._path, text)

    def _path(self, match: re.Match[str]) -> str:
        number = int(match[1])
        return self.paths[number] if number < len(self.paths) else match[0]


def unsupported(path: str, words: str) -> InvalidRequest:
    """The error of a value that the API knows and this server does not.

    Args:
        path: path of the value in the body.
        words: limit and remedy.
    """
    return InvalidRequest(path, f"`{path}` is not supported: {words}", "unsupported_parameter")
