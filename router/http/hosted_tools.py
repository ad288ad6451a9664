"""Tools that a server would run, such as web search: left out of the prompt, or refused.

arriero parses calls and runs none. Agents offer such tools beside their own, and work without them.
Knows the types of tools; knows nothing of the tools that a client runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from arriero.shards.errors import InvalidRequest

if TYPE_CHECKING:
    from fastapi import Request

HostedTools = Literal["ignore", "refuse"]
"""What happens to a request that offers such tools."""


class Tool(Protocol):
    """A tool on offer."""

    @property
    def type(self) -> str:
        """Kind of the tool."""


def check(request: Request, tools: Sequence[Tool] | None, own: str) -> None:
    """Refuse tools that a server would run, if the gateway is set to refuse them.

    Args:
        request: the request.
        tools: of its body.
        own: type of the tools that the client runs.

    Raises:
        InvalidRequest: a tool has another type.
    """
    if request.app.state.hosted_tools == "ignore":
        return
    for number, tool in enumerate(tools or ()):
        if tool.type != own:
            field = f"tools[{number}].type"
            raise InvalidRequest(
                field,
                f'`{field}`="{tool.type[:64]}" is a tool that a server would run, and none is run '
                f'here; offer tools of type "{own}"',
                "unsupported_parameter",
            )
