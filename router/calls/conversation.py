"""Messages, tools and documents of a chat request, checked and in the form that templates take.

Knows the request messages and their limits; knows nothing of sampling, streams or groups.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.images import GivenImage, read_image
from arriero.shards.errors import InvalidRequest

MAX_TOOLS = 128
MAX_DOCUMENTS = 128
MAX_JSON_DEPTH = 64
"""Deepest nesting of a tool's schema or a call's arguments."""
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolOffer:
    """The tools of a request and the rules for calls.

    Attributes:
        tools: in the form that templates take.
        parallel: several calls are allowed; without, the first call ends the output.
        forced: the tools of which the model must call at least one; empty for no forced call.
        strict: the tools whose arguments must fit their schema.
    """

    tools: tuple[Mapping[str, Any], ...]
    parallel: bool = True
    forced: tuple[Mapping[str, Any], ...] = ()
    strict: tuple[Mapping[str, Any], ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the tools."""
        return [tool["function"]["name"] for tool in self.tools]


def read_messages(
    messages: Sequence[pb.Message],
) -> tuple[list[dict[str, Any]], list[GivenImage]]:
    """A conversation in the form that templates take, and its images in order.

    Raises:
        InvalidRequest: a call's arguments are nested too deep, or an image is malformed.
    """
    read = []
    images: list[GivenImage] = []
    for number, message in enumerate(messages):
        content = _content(f"messages[{number}]", message, images)
        entry: dict[str, Any] = {"role": message.role, "content": content}
        if message.name:
            entry["name"] = message.name
        if message.tool_call_id:
            entry["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            where = f"messages[{number}].tool_calls"
            entry["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": _arguments(f"{where}[{position}].arguments", call.arguments),
                    },
                }
                for position, call in enumerate(message.tool_calls)
            ]
        read.append(entry)
    return read, images


def _arguments(name: str, text: str) -> dict[str, Any] | str:
    """A call's arguments in the form that templates take.

    Some clients and models send no arguments for a tool without parameters. Text that is no JSON
    object is shown to the model unchanged, so that the model can correct its call.
    """
    if text.strip() in ("", "null"):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return _json_object(name, text) if isinstance(value, dict) else text


def _content(where: str, message: pb.Message, images: list[GivenImage]) -> str | list[Any]:
    """Text, or a list of parts if there are images; adds the images to `images`."""
    if not message.parts:
        return message.content
    if message.content:
        raise InvalidRequest(
            f"{where}.parts", f"`{where}` has `content` and `parts`; give only one of the two"
        )
    parts: list[dict[str, str]] = []
    num_before = len(images)
    for number, part in enumerate(message.parts):
        field = f"{where}.parts[{number}]"
        kind = part.WhichOneof("part")
        if kind is None:
            raise InvalidRequest(field, f"`{field}` is empty; give `text` or `image`")
        if kind == "image":
            images.append(read_image(f"{field}.image", part.image))
            parts.append({"type": "image"})
        else:
            parts.append({"type": "text", "text": part.text})
    if len(images) == num_before:
        return "".join(part["text"] for part in parts)
    return parts


def read_tools(tools: Sequence[pb.Tool]) -> tuple[Mapping[str, Any], ...]:
    """Tools in the form that templates take.

    Raises:
        InvalidRequest: a name or a schema is invalid, or there are too many tools.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(
            "tools", f"`tools` has {len(tools)} entries; the limit is {MAX_TOOLS}; offer fewer"
        )
    read: dict[str, Mapping[str, Any]] = {}
    for number, tool in enumerate(tools):
        if not _TOOL_NAME.fullmatch(tool.name):
            raise InvalidRequest(
                "tools",
                f"`tools[{number}].name`={tool.name[:64]!r} must be 1 to 128 letters, digits, "
                "dots, dashes or underscores",
            )
        if tool.name in read:
            raise InvalidRequest(
                "tools", f"`tools[{number}].name`={tool.name!r} occurs twice; keep one"
            )
        function: dict[str, Any] = {"name": tool.name, "description": tool.description}
        schema = tool.parameters or '{"type": "object", "properties": {}}'
        function["parameters"] = _json_object(f"tools[{number}].parameters", schema)
        read[tool.name] = {"type": "function", "function": function}
    return tuple(read.values())


def read_documents(documents: Sequence[pb.Document]) -> tuple[Mapping[str, str], ...]:
    """Documents in the form that templates take.

    Raises:
        InvalidRequest: there are too many documents.
    """
    if len(documents) > MAX_DOCUMENTS:
        raise InvalidRequest(
            "documents",
            f"`documents` has {len(documents)} entries; the limit is {MAX_DOCUMENTS}; send fewer",
        )
    return tuple({"title": document.title, "text": document.text} for document in documents)


def read_variables(text: str) -> dict[str, Any]:
    """Further variables for a template.

    Raises:
        InvalidRequest: the text is no JSON object.
    """
    return _json_object("template_variables", text) if text else {}


def read_offer(request: pb.ChatRequest) -> ToolOffer | None:
    """The tools that a conversation offers; None for none."""
    tools = read_tools(request.tools)
    choice = request.tool_choice
    if choice not in pb.ToolChoice.values():
        raise InvalidRequest(
            "tool_choice", f"`tool_choice`={choice} is unknown; give a value of ToolChoice"
        )
    if request.tool_name and choice != pb.TOOL_CHOICE_NAMED:
        raise InvalidRequest(
            "tool_name", "`tool_name` needs TOOL_CHOICE_NAMED; leave out `tool_name`"
        )
    if choice == pb.TOOL_CHOICE_NONE:
        return None
    must = choice in (pb.TOOL_CHOICE_REQUIRED, pb.TOOL_CHOICE_NAMED)
    if must and not tools:
        raise InvalidRequest("tool_choice", "`tool_choice` asks for a call; offer `tools`")
    if not tools:
        return None
    parallel = request.parallel_tool_calls or not request.HasField("parallel_tool_calls")
    forced = tools if must else ()
    if choice == pb.TOOL_CHOICE_NAMED:
        parallel = False
        forced = tuple(tool for tool in tools if tool["function"]["name"] == request.tool_name)
        if not forced:
            raise InvalidRequest(
                "tool_choice",
                f"`tool_choice` names {request.tool_name[:128]!r}, which is not among `tools`",
            )
    strict = tuple(
        tool for tool, message in zip(tools, request.tools, strict=True) if message.strict
    )
    return ToolOffer(tools=tools, parallel=parallel, forced=forced, strict=strict)


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(name, f"`{name}` is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(name, f"`{name}` is a JSON {type(value).__name__}, not an object")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):  # later steps (special token guard, templates) recurse
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return value
    raise InvalidRequest(name, f"`{name}` is nested deeper than {MAX_JSON_DEPTH}; make it flatter")
