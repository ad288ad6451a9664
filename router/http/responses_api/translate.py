"""Translates a body of `/v1/responses` to a chat body.

Knows the items of the API; knows nothing of limits, which the chat body and the calls check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from arriero.router.http.conversation import Conversation, unsupported
from arriero.router.http.messages import ContentPart
from arriero.router.http.request_schemas import ChatBody
from arriero.router.http.responses_api.schemas import (
    ITEM,
    InputBody,
    Item,
    ResponsesBody,
    Tool,
)
from arriero.shards.errors import InvalidRequest

Json = dict[str, Any]

_NAMES = (
    (re.compile(r"(\btools\[\d+\])\.function\.(\w+)"), r"\1.\2"),
    (re.compile(r"(\bmessages\[\d+\])\.tool_calls\[\d+\]\.function\.(\w+)"), r"\1.\2"),
    (re.compile(r"\bresponse_format\.json_schema(\.schema)?"), "text.format.schema"),
    (re.compile(r"\bmax_tokens\b"), "max_output_tokens"),
    (re.compile(r"`messages`"), "`input`"),
    (re.compile(r"^messages$"), "input"),
)
_ROLES = frozenset({"user", "assistant", "system", "developer"})
_ITEMS = TypeAdapter(list[Item])


def input_items(body: InputBody) -> list[Json]:
    """The input as items, in the form in which a response keeps them."""
    if body.input is None:
        return []
    if isinstance(body.input, str):
        return [_in_parts({"type": "message", "role": "user", "content": body.input})]
    return [_in_parts(item.model_dump(exclude_none=True)) for item in body.input]


def _in_parts(item: Json) -> Json:
    """An item whose text is a list of parts, as the API lists items."""
    if not isinstance(item.get("content"), str):
        return item
    kind = "output_text" if item.get("role") == "assistant" else "input_text"
    return item | {"content": [{"type": kind, "text": item["content"]}]}


def chat_body(body: InputBody, earlier: Sequence[Json]) -> tuple[ChatBody, Conversation]:
    """The chat body of a request, and the names of its fields.

    Args:
        body: the request.
        earlier: items of the earlier responses, in order.

    Raises:
        InvalidRequest: an item or tool is not supported, or breaks a limit of the chat body.
    """
    conversation = Conversation(_NAMES)
    if body.instructions:
        conversation.add("instructions", role="system", content=body.instructions)
    for item in _ITEMS.validate_python(list(earlier)):
        _add(conversation, "previous_response_id", item)
    if isinstance(body.input, str):
        conversation.add("input", role="user", content=body.input)
    else:
        for number, item in enumerate(body.input or ()):
            _add(conversation, f"input[{number}]", item)
    given: Json = {
        "model": body.model,
        "tools": [_tool(n, tool) for n, tool in functions(body.tools)] or None,
        "tool_choice": _choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
    }
    cached = ("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options")
    given |= {name: getattr(body, name) for name in cached if getattr(body, name) is not None}
    if body.prompt_cache_options is not None:
        given["prompt_cache_options"] = body.prompt_cache_options.model_dump()
    form = None if body.text is None else body.text.format
    if form is not None:
        given["response_format"] = {"type": form.type}
        if form.json_schema is not None:
            given["response_format"]["json_schema"] = {"schema": form.json_schema}
    if isinstance(body, ResponsesBody):
        given |= {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "seed")}
        given["max_tokens"] = body.max_output_tokens
        if body.speculation is not None:
            given["speculation"] = body.speculation.model_dump()
        if body.with_logprobs:
            given |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return conversation.chat_body(given), conversation


def _choice(body: InputBody) -> Any:  # noqa: ANN401
    choice = body.tool_choice
    return choice if choice is None or isinstance(choice, str) else choice.model_dump()


def functions(tools: Sequence[Tool] | None) -> list[tuple[int, Tool]]:
    """The tools that the client runs itself, with their positions."""
    return [(n, tool) for n, tool in enumerate(tools or ()) if tool.type == "function"]


def _tool(number: int, tool: Tool) -> Json:
    if tool.name is None:
        path = f"tools[{number}].name"
        raise InvalidRequest(path, f"`{path}` is needed", "missing_required_parameter")
    function: Json = {"name": tool.name, "description": tool.description or ""}
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    return {"type": "function", "function": function | {"strict": bool(tool.strict)}}


def _add(conversation: Conversation, path: str, item: Item) -> None:
    """Add an item: a message, or a call in the message of its turn, or a result."""
    if item.type == "reasoning":
        return
    _check_extra(path, item)
    if item.type == "message":
        _add_message(conversation, path, item)
    elif item.type == "function_call":
        function = {"name": _needed(path, "name", item.name), "arguments": item.arguments or ""}
        call = {"id": item.call_id or "", "type": "function", "function": function}
        conversation.assistant(path).setdefault("tool_calls", []).append(call)
    elif item.type == "function_call_output":
        content = item.output if isinstance(item.output, str) else _parts(item.output)
        call_id = _needed(path, "call_id", item.call_id)
        conversation.add(path, role="tool", content=content, tool_call_id=call_id)
    else:
        raise unsupported(
            f"{path}.type",
            f'"{item.type[:64]}" here; give message, function_call or function_call_output',
        )


def _add_message(conversation: Conversation, path: str, item: Item) -> None:
    role = _needed(path, "role", item.role)
    if role not in _ROLES:
        raise InvalidRequest(
            f"{path}.role",
            f"`{path}.role`={role[:64]!r} must be one of {', '.join(sorted(_ROLES))}",
        )
    content = item.content if isinstance(item.content, str) else _parts(item.content)
    last = conversation.messages[-1] if conversation.messages else {}
    if role == "assistant" and last.get("role") == "assistant" and "content" not in last:
        last["content"] = content  # the text of a turn that began with a call
    else:
        conversation.add(path, role=role, content=content)


def _parts(parts: Sequence[ContentPart] | None) -> list[Json]:
    return [part.model_dump(exclude_none=True) for part in parts or ()]


def _needed(path: str, name: str, value: str | None) -> str:
    if value is None:
        raise InvalidRequest(
            f"{path}.{name}", f"`{path}.{name}` is needed", "missing_required_parameter"
        )
    return value


def _check_extra(path: str, item: Item) -> None:
    extra: Mapping[str, Any] = item.model_extra or {}
    for name, value in extra.items():
        if value is not None and name not in ITEM:
            raise unsupported(f"{path}.{name}", "leave it out")
