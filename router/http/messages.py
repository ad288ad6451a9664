"""The JSON of a conversation: messages, tool calls, tools and documents.

Accepts earlier answers that a client sends back, in the spellings of common clients. Knows JSON;
knows nothing of the model: checks against the model are shared with gRPC.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from arriero.router.http import fields
from arriero.router.http.cache_fields import Breakpoints, CacheBreakpoint, CacheControl
from arriero.router.http.fields import Body

_TEXT_PARTS = frozenset({"input_text", "output_text"})
_IMAGE_PARTS = frozenset({"input_image"})
THOUGHT_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning", "reasoning_text"})
"""Parts with the reasoning of an earlier answer; dropped, as `reasoning_content` is."""


class ImageUrl(Body):
    """An image in a data URL."""

    others: ClassVar = fields.IMAGE
    url: str = Field(description="data:image/…;base64,…: JPEG, PNG or WebP. No URL is fetched.")


def _image(value: Any) -> Any:  # noqa: ANN401
    return {"url": value} if isinstance(value, str) else value


class ContentPart(BaseModel):
    """A part of a message, of type "text" or "image_url"."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None
    image_url: Annotated[ImageUrl, BeforeValidator(_image)] | None = Field(
        None, description="For models that read images."
    )
    cache_control: CacheControl | None = Field(None, description="As of a message.")
    prompt_cache_breakpoint: CacheBreakpoint | None = Field(None, description="As of a message.")

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, data: Any) -> Any:  # noqa: ANN401
        """Translate spellings of other APIs to this API."""
        if isinstance(data, str):
            return {"type": "text", "text": data}
        if not isinstance(data, dict):
            return data
        part = {
            name: value
            for name, value in data.items()
            if value is not None and name not in fields.PART
        }
        kind = part.get("type")
        if kind is None and "text" in part:
            part["type"] = "text"
        elif not isinstance(kind, str):
            return part  # refused by its type; only text can be looked up
        elif kind in _TEXT_PARTS:
            part["type"] = "text"
        elif kind in _IMAGE_PARTS:
            part["type"] = "image_url"
        elif kind == "refusal" and "text" not in part:
            part["type"], part["text"] = "text", part.pop("refusal", "")
        return part


class FunctionCall(Body):
    """The function of a tool call."""

    others: ClassVar = fields.CALL
    name: str
    arguments: str | dict[str, Any] = Field(
        "", description="A JSON object, or its text; empty for no arguments."
    )


class MessageToolCall(Body):
    """A call in an earlier answer."""

    others: ClassVar = fields.CALL
    id: str = Field("", description="Id for the result's `tool_call_id`.")
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Breakpoints):
    """A message of a conversation."""

    others: ClassVar = fields.MESSAGE
    role: str = Field(description="system, developer, user, assistant or tool.")
    content: str | list[ContentPart] | None = Field(
        None, description="Text, or parts: text and images."
    )
    name: str | None = Field(None, description="Name of the speaker or the tool.")
    tool_calls: list[MessageToolCall] | None = Field(None, description="Calls in this message.")
    tool_call_id: str | None = Field(None, description='The call of a "tool" message.')
    refusal: str | None = Field(
        None, description="Text of an assistant's refusal; used when `content` is empty."
    )
    function_call: FunctionCall | None = Field(
        None, description="A call in the API's older form; read as an entry of `tool_calls`."
    )


class Function(Breakpoints):
    """A function on offer."""

    others: ClassVar = fields.TOOL
    name: str = Field(description="1 to 128 letters, digits, dots, dashes or underscores.")
    description: str = Field("", description="Purpose of the function, for the model.")
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments.")
    strict: bool = Field(
        False,
        description="Arguments fit the schema once the model begins a call. With a `tool_choice` "
        "that forces a call, arguments always fit. A call that `max_tokens` or a stop string cuts "
        "off is a valid beginning.",
    )


class Tool(Breakpoints):
    """A tool on offer."""

    others: ClassVar = fields.TOOL
    type: Literal["function"] = "function"
    function: Function


class HostedTool(BaseModel):
    """A tool that a server would run, such as web search: left out, or refused by setting."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str = Field(description='Any type but "function".')


def _kind_of_tool(value: Any) -> str:  # noqa: ANN401
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "HostedTool" if isinstance(kind, str) and kind != "function" else "Tool"


ToolEntry = Annotated[
    Annotated[Tool, Tag("Tool")] | Annotated[HostedTool, Tag("HostedTool")],
    Discriminator(_kind_of_tool),
]
"""An entry of `tools`."""


class Document(Body):
    """A text to answer from."""

    title: str = Field("", description="Name of the document.")
    text: str = Field(description="Text of the document.")


class FunctionName(Body):
    """Name of a function."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class AllowedToolNames(Body):
    """Some of the tools on offer."""

    mode: Literal["auto", "required"] = Field(description='"required" forces a call.')
    tools: list[NamedTool] = Field(description="The tools that the model sees.")


class AllowedTools(Body):
    """The tools that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolNames


def usual_choice(value: Any) -> Any:  # noqa: ANN401
    """Translate "any" and the objects of other APIs to a `tool_choice` of this API."""
    if value == "any":
        return "required"
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    if kind in ("auto", "none", "required", "any") and len(value) == 1:
        return "required" if kind == "any" else kind
    if kind == "function" and isinstance(value.get("name"), str) and "function" not in value:
        left = {name: given for name, given in value.items() if name != "name"}
        return {**left, "function": {"name": value["name"]}}
    return value


ToolChoice = Annotated[
    Literal["auto", "none", "required"] | NamedTool | AllowedTools, BeforeValidator(usual_choice)
]
