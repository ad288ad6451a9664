"""The JSON of a conversation: messages, the calls in them, tools and documents.

What a client sends back of an earlier answer is taken, in the spellings of the clients in use.
Knows JSON; what a value means to the model is checked where gRPC's is.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from arriero.router.http import fields
from arriero.router.http.fields import Body

_TEXT_PARTS = frozenset({"input_text", "output_text"})
_IMAGE_PARTS = frozenset({"input_image"})
THOUGHT_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning", "reasoning_text"})
"""Parts that hold what an earlier answer thought: left out, as `reasoning_content` is."""


class ImageUrl(Body):
    """An image, in its URL."""

    others: ClassVar = fields.IMAGE
    url: str = Field(description="data:image/…;base64,…: JPEG, PNG or WebP. None are fetched.")


def _image(value: Any) -> Any:  # noqa: ANN401
    return {"url": value} if isinstance(value, str) else value


class ContentPart(BaseModel):
    """A part of a message; parts of the types "text" and "image_url" are taken."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None
    image_url: Annotated[ImageUrl, BeforeValidator(_image)] | None = Field(
        None, description="For models that read images."
    )

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, data: Any) -> Any:  # noqa: ANN401
        """The same part in this API's own words."""
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
        "", description="A JSON object, as text or as it is; empty for none."
    )


class MessageToolCall(Body):
    """A call that an earlier answer made."""

    others: ClassVar = fields.CALL
    id: str = Field("", description="The result's `tool_call_id` names it.")
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One message of a conversation."""

    others: ClassVar = fields.MESSAGE
    role: str = Field(description="system, developer, user, assistant or tool.")
    content: str | list[ContentPart] | None = Field(
        None, description="Text, or parts: text and images."
    )
    name: str | None = Field(None, description="The speaker's or the tool's name.")
    tool_calls: list[MessageToolCall] | None = Field(None, description="Calls made by it.")
    tool_call_id: str | None = Field(None, description='The call that a "tool" message answers.')
    refusal: str | None = Field(
        None, description="What an assistant said to refuse: its words where `content` has none."
    )
    function_call: FunctionCall | None = Field(
        None, description="A call in the API's older form, as if in `tool_calls`."
    )


class Function(Body):
    """A function on offer."""

    others: ClassVar = fields.TOOL
    name: str = Field(description="1 to 128 letters, digits, dots, dashes or underscores.")
    description: str = Field("", description="What it does, for the model.")
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of its arguments.")
    strict: bool = Field(
        False,
        description="Arguments fit the schema: from the moment that the model begins a call of it. "
        "Where `tool_choice` forces a call they always do. A call that `max_tokens` or a stop "
        "string cuts off fits as far as it goes.",
    )


class Tool(Body):
    """A tool on offer."""

    others: ClassVar = fields.TOOL
    type: Literal["function"] = "function"
    function: Function


class Document(Body):
    """A text to answer from."""

    title: str = Field("", description="Its name.")
    text: str = Field(description="What it says.")


class FunctionName(Body):
    """A function, by name."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class AllowedToolNames(Body):
    """Some of the tools on offer."""

    mode: Literal["auto", "required"] = Field(description='"required" forces a call of one.')
    tools: list[NamedTool] = Field(description="Only these are offered to the model.")


class AllowedTools(Body):
    """The tools that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolNames


def usual_choice(value: Any) -> Any:  # noqa: ANN401
    """A `tool_choice` in this API's own words: "any" and objects for words are in use elsewhere."""
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
