"""Translates a body of `/v1/messages` to a chat body.

Knows the blocks of messages; knows nothing of limits, which the chat body and the calls check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from arriero.router.http.conversation import Conversation, unsupported
from arriero.router.http.messages_api.schemas import (
    BLOCK,
    Block,
    ChoiceParam,
    CountBody,
    MessageParam,
    MessagesBody,
    ToolParam,
)
from arriero.router.http.request_schemas import ChatBody
from arriero.shards.errors import InvalidRequest

Json = dict[str, Any]

_NAMES = (
    (re.compile(r"(\btools\[\d+\])\.function\.parameters\b"), r"\1.input_schema"),
    (re.compile(r"(\btools\[\d+\])\.function\.(\w+)"), r"\1.\2"),
    (re.compile(r"(\bmessages\[\d+\])\.tool_calls\[\d+\]\.function\.arguments\b"), r"\1.content"),
    (re.compile(r"\bresponse_format\.json_schema(\.schema)?"), "output_config.format.schema"),
    (re.compile(r"\bstop\b(?=`)"), "stop_sequences"),
)
_THOUGHTS = frozenset({"thinking", "redacted_thinking"})
_SOURCES = {
    "image": "give {type: base64, media_type, data}; nothing is fetched",
    "document": "give {type: text, media_type: text/plain, data}, or the text itself",
}


def chat_body(body: CountBody) -> tuple[ChatBody, Conversation]:
    """The chat body of a request, and the names of its fields.

    Raises:
        InvalidRequest: a block or tool is not supported, or breaks a limit of the chat body.
    """
    conversation = Conversation(_NAMES)
    if body.system:
        system = body.system
        text = system if isinstance(system, str) else _texts("system", system)
        if text:
            blocks = () if isinstance(system, str) else system
            conversation.add("system", role="system", content=text, **_cached(*blocks))
    for number, message in enumerate(body.messages):
        _add(conversation, f"messages[{number}]", message)
    given: Json = {
        "model": body.model,
        "tools": [_tool(number, tool) for number, tool in own_tools(body.tools)] or None,
    }
    if body.messages and body.messages[-1].role == "assistant":
        given["continue_final_message"] = True
    _choose(given, body.tool_choice)
    given |= _cached(body)
    given["prompt_cache_key"] = body.prompt_cache_key
    form = body.output_format
    if form is None and body.output_config is not None:
        form = body.output_config.format
    if form is not None:
        schema = {"schema": form.json_schema}
        given["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesBody):
        names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stream")
        given |= {name: getattr(body, name) for name in names}
        given["stop"] = body.stop_sequences
        if body.speculation is not None:
            given["speculation"] = body.speculation.model_dump()
    return conversation.chat_body(given), conversation


def own_tools(tools: Sequence[ToolParam] | None) -> list[tuple[int, ToolParam]]:
    """The tools that the client runs itself, with their positions.

    Tools that the API's own server would run (web search, code) have a type of their own; the model
    is not shown them.
    """
    return [(n, tool) for n, tool in enumerate(tools or ()) if tool.type == "custom"]


def _tool(number: int, tool: ToolParam) -> Json:
    for name in tool.model_extra or ():
        raise unsupported(f"tools[{number}].{name}", "leave it out")
    if tool.input_schema is None:
        path = f"tools[{number}].input_schema"
        raise InvalidRequest(path, f"`{path}` is needed", "missing_required_parameter")
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function, **_cached(tool)}


def _cached(*places: CountBody | MessageParam | ToolParam | Block) -> Json:
    """The field `cache_control` of a chat body, from that of the last place that has one."""
    controls = [place.cache_control for place in places if place.cache_control is not None]
    return {"cache_control": controls[-1].model_dump()} if controls else {}


def _choose(given: Json, choice: ChoiceParam | None) -> None:
    """Set `tool_choice` and `parallel_tool_calls`."""
    if choice is None:
        return
    if choice.disable_parallel_tool_use:
        given["parallel_tool_calls"] = False
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequest(
                "tool_choice.name",
                '`tool_choice.name` is needed with type "tool"',
                "missing_required_parameter",
            )
        given["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif given["tools"] or choice.type != "none":
        given["tool_choice"] = "required" if choice.type == "any" else choice.type


def _add(conversation: Conversation, path: str, message: MessageParam) -> None:
    """Add a message: an assistant's with its calls, a result of a tool, or parts of a user."""
    if isinstance(message.content, str):
        conversation.add(path, role=message.role, content=message.content)
    elif message.role == "assistant":
        _add_assistant(conversation, path, message.content)
    elif message.role == "system":
        text = _texts(f"{path}.content", message.content)
        conversation.add(path, role="system", content=text, **_cached(*message.content))
    else:
        _add_user(conversation, path, message.content)
    if conversation.messages:
        conversation.messages[-1].update(_cached(message))


def _add_user(conversation: Conversation, path: str, blocks: Sequence[Block]) -> None:
    parts: list[Json] = []
    added = False
    for number, block in enumerate(blocks):
        at = f"{path}.content[{number}]"
        if block.type != "tool_result":
            parts += _parts(at, block)
            continue
        if parts:
            conversation.add(path, role="user", content=parts)
            parts = []
        _check_extra(at, block)
        content = _result(at, block.content or "")
        call_id = block.tool_use_id or ""
        conversation.add(at, role="tool", content=content, tool_call_id=call_id, **_cached(block))
        added = True
    if parts or not added:
        conversation.add(path, role="user", content=parts)


def _result(path: str, content: str | list[Block]) -> str | list[Json]:
    """The content of a tool's result as that of a chat message."""
    if isinstance(content, str):
        return content
    return [
        part
        for number, block in enumerate(content)
        for part in _parts(f"{path}.content[{number}]", block)
    ]


def _add_assistant(conversation: Conversation, path: str, blocks: Sequence[Block]) -> None:
    texts: list[str] = []
    calls: list[Json] = []
    for number, block in enumerate(blocks):
        at = f"{path}.content[{number}]"
        if block.type in _THOUGHTS:
            continue
        _check_extra(at, block)
        if block.type == "tool_use":
            if not block.name:
                raise InvalidRequest(
                    f"{at}.name", f"`{at}.name` is needed", "missing_required_parameter"
                )
            function = {"name": block.name, "arguments": _dumped(f"{at}.input", block.input or {})}
            calls.append({"id": block.id or "", "type": "function", "function": function})
        elif block.type == "text":
            texts.append(block.text or "")
        else:
            raise _unknown(at, block)
    message: Json = {"role": "assistant", "content": "".join(texts), **_cached(*blocks)}
    if calls:
        message["tool_calls"] = calls
    conversation.add(path, **message)


def _dumped(path: str, value: Json) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        raise InvalidRequest(path, f"`{path}` is nested too deep; make it flatter") from None


def _texts(path: str, blocks: Sequence[Block]) -> str:
    """The joined text of blocks that may hold nothing else."""
    texts = []
    for number, block in enumerate(blocks):
        at = f"{path}[{number}]"
        if block.type != "text":
            raise unsupported(f"{at}.type", f'"{block.type[:64]}" here; give "text"')
        _check_extra(at, block)
        texts.append(block.text or "")
    return "\n\n".join(text for text in texts if text)


def _parts(path: str, block: Block) -> list[Json]:
    """The parts of a chat message for a block of a user's message."""
    if block.type in _THOUGHTS:
        return []
    _check_extra(path, block)
    source = block.source
    if block.type == "text":
        return [{"type": "text", "text": block.text or "", **_cached(block)}]
    if block.type not in _SOURCES or source is None:
        raise _unknown(path, block)
    if block.type == "document" and source.type == "text" and source.data is not None:
        return [{"type": "text", "text": source.data, **_cached(block)}]
    if block.type == "image" and source.type == "base64" and source.data is not None:
        url = f"data:{source.media_type or 'image/png'};base64,{source.data}"
        return [{"type": "image_url", "image_url": {"url": url}, **_cached(block)}]
    raise unsupported(f"{path}.source", _SOURCES[block.type])


def _check_extra(path: str, block: Block) -> None:
    for name, value in (block.model_extra or {}).items():
        if value is not None and name not in BLOCK:
            raise unsupported(f"{path}.{name}", "leave it out")


def _unknown(path: str, block: Block) -> InvalidRequest:
    return unsupported(
        f"{path}.type",
        f'"{block.type[:64]}" here; give text, image, document, tool_use or tool_result',
    )
