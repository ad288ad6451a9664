"""The JSON of requests to `/v1/responses`.

Honoured fields are the attributes; the tables hold the fields without effect and the refused ones,
as in `router/http/fields.py`. Knows JSON; knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from arriero.router.http import fields
from arriero.router.http.cache_fields import SessionFields
from arriero.router.http.fields import NOTHING, Body, Int, Rule, hint, invalid, refused
from arriero.router.http.messages import ContentPart, ToolChoice
from arriero.router.http.request_schemas import Speculation

Json = dict[str, Any]

_REASONING = "for models that reason before they answer; Llama models do not."
_OWN = "the caller's own notes."

BODY: Mapping[str, Rule] = {
    "reasoning": hint(_REASONING),
    "truncation": hint("prompts are never cut; a prompt that is too long is refused."),
    "user": hint(_OWN),
    "safety_identifier": hint(_OWN),
    "client_metadata": hint(_OWN),
    "service_tier": hint("there is one tier."),
    "max_tool_calls": hint("limits tools that a server runs; none is run."),
    "context_management": hint("prompts are never cut."),
    "stream_options": hint("events are not padded."),
    "conversation": refused("give `previous_response_id` or the whole `input`", *NOTHING),
    "prompt": refused("prompt templates are not stored; give `input`", *NOTHING),
    "moderation": refused("nothing is moderated", *NOTHING),
}
"""`/v1/responses`."""

TEXT: Mapping[str, Rule] = {"verbosity": hint(_REASONING)}
"""`text`."""

ITEM = frozenset(
    {
        *("id", "status", "annotations", "logprobs", "phase", "provider_data", "created_by"),
        *("metadata", "internal_chat_message_metadata_passthrough", "caller", "namespace"),
        *("encrypted_content", "summary", "call_id", "output", "name", "arguments"),
    }
)
"""Fields of input items that change no token: records of earlier answers, and hints."""

_LOGPROBS = "message.output_text.logprobs"


def _flat_choice(value: Any) -> Any:  # noqa: ANN401
    """Translate the API's flat `allowed_tools` to that of a chat body."""
    if not isinstance(value, dict) or value.get("type") != "allowed_tools" or "tools" not in value:
        return value
    tools = value["tools"]
    if isinstance(tools, list):
        tools = [
            {"type": "function", "function": {"name": tool.get("name")}}
            for tool in tools
            if isinstance(tool, dict) and tool.get("type", "function") == "function"
        ]
    allowed = {"mode": value.get("mode", "auto"), "tools": tools}
    return {"type": "allowed_tools", "allowed_tools": allowed}


class Item(BaseModel):
    """An item of `input`: message, function_call, function_call_output or reasoning."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str = Field("message", description="Kind of the item.")
    role: str | None = Field(None, description="Of a message.")
    content: str | list[ContentPart] | None = Field(None, description="Of a message.")
    call_id: str | None = Field(None, description="Of a call and of its output.")
    name: str | None = Field(None, description="Function of a call.")
    arguments: str | None = Field(None, description="Arguments of a call, as JSON text.")
    output: str | list[ContentPart] | None = Field(None, description="Of a function_call_output.")


class Tool(BaseModel):
    """A tool on offer, flat; types that a server would run are not shown to the model."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str = Field(description='"function"; other types are ignored.')
    name: str | None = Field(None, description="1 to 128 letters, digits, dots, dashes, _.")
    description: str | None = Field(None, description="Purpose of the function, for the model.")
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments.")
    strict: bool | None = Field(None, description="Arguments fit the schema once a call begins.")


class TextFormat(Body):
    """Form of the output, flat."""

    others: ClassVar = {k: v for k, v in fields.SCHEMA.items() if k != "schema"}
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = Field(None, alias="schema", description="JSON Schema.")

    @model_validator(mode="after")
    def _check(self) -> TextFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise invalid("schema", '`schema` and type "json_schema" go together; give both')
        return self


class Text(Body):
    """Form of the output's text."""

    others: ClassVar = TEXT
    format: TextFormat | None = Field(None, description="Text, a JSON object, or JSON of a schema.")


class InputBody(SessionFields):
    """`/v1/responses/input_tokens`: the fields of a prompt."""

    others: ClassVar = BODY
    model: str = Field("", description="Id of a model; may be empty when a single model is served.")
    input: str | list[Item] | None = Field(None, description="Text of a user, or items.")
    instructions: str | None = Field(
        None, description="A system message before the input; not inherited by later responses."
    )
    previous_response_id: str | None = Field(
        None, description="Stored response whose input and output come before the input."
    )
    tools: list[Tool] | None = Field(None, description="Tools that the model may call.")
    tool_choice: Annotated[ToolChoice | None, BeforeValidator(_flat_choice)] = Field(
        None, description='"none" hides the tools; "required" or a named tool forces a call.'
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false ends the output after the first call. Default true."
    )
    text: Text | None = Field(None, description="Form of the output.")


class ResponsesBody(InputBody):
    """`/v1/responses`."""

    max_output_tokens: Int | None = Field(
        None, ge=1, description="Most output tokens. Default: the room of the context."
    )
    temperature: float | None = Field(None, description="0 is greedy. Default 1.")
    top_p: float | None = Field(None, description="As in `/v1/chat/completions`.")
    top_k: Int | None = Field(None, description="As in `/v1/chat/completions`.")
    seed: Int | None = Field(None, description="As in `/v1/chat/completions`.")
    speculation: Speculation | None = Field(
        None, description="As in `/v1/chat/completions`; changes no token."
    )
    stream: bool = Field(False, description="Answer in server-sent events.")
    store: bool = Field(True, description="Keep the response for later requests, for a while.")
    background: bool = Field(False, description="Answer at once; go on without the client.")
    metadata: dict[str, Any] | None = Field(None, description="Returned with the response.")
    include: list[str] | None = Field(
        None,
        description=f'Further contents: "{_LOGPROBS}"; others are left out.',
    )
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = Field(
        None, description="Alternatives at each position, 0 to 20, with log-probabilities."
    )

    @property
    def with_logprobs(self) -> bool:
        """Whether the text comes with log-probabilities."""
        return bool(self.top_logprobs) or _LOGPROBS in (self.include or ())

    @model_validator(mode="after")
    def _check(self) -> ResponsesBody:
        if self.background and not self.store:
            raise invalid("background", "`background` needs `store`; leave `store` out")
        return self
