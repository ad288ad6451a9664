"""The JSON of requests to `/v1/messages`.

Honoured fields are the attributes; the tables hold the fields without effect and the refused ones,
as in `router/http/fields.py`. Knows JSON; knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from arriero.router.http import fields
from arriero.router.http.cache_fields import Breakpoints, CacheControl
from arriero.router.http.fields import NOTHING, Body, Int, Rule, hint, refused
from arriero.router.http.request_schemas import Speculation

_OF_CLIENT = "a client's own record of an earlier answer."
_CACHED = "a tool_choice is no part of the prompt."

BODY: Mapping[str, Rule] = {
    "metadata": hint("the caller's own name for its user."),
    "thinking": hint("for models that reason before they answer; Llama models do not."),
    "context_management": hint("prompts are never cut or cleared."),
    "service_tier": hint("there is one tier."),
    "betas": hint("names of behaviours; each field is read or refused by itself."),
    "inference_geo": hint("the deployment decides where it runs."),
    "speed": hint("there is one speed."),
    "container": refused("no code runs beside the model", *NOTHING),
    "mcp_servers": refused("no tool runs beside the model; give `tools`", *NOTHING),
}
"""`/v1/messages`."""

OUTPUT: Mapping[str, Rule] = {
    "effort": hint("for models that reason before they answer; Llama models do not."),
    "task_budget": hint("for models that reason before they answer; Llama models do not."),
}
"""`output_config`."""

TOOL: Mapping[str, Rule] = {
    **fields.TOOL,
    "input_examples": hint("the schema describes the arguments."),
}
"""An entry of `tools`."""

CHOICE: Mapping[str, Rule] = {"cache_control": hint(_CACHED)}

BLOCK = frozenset(
    {
        *("citations", "caller", "signature", "is_error", "title", "context"),
        *("index", "parsed", "partial_json", "provider_specific_fields", "metadata"),
    }
)
"""Fields of content blocks that change no token: records of earlier answers, and hints."""


class Source(BaseModel):
    """Where an image or a document is."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class Block(BaseModel):
    """A block of a message: text, image, document, tool_use, tool_result or thinking."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None
    source: Source | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    cache_control: CacheControl | None = None


class MessageParam(Breakpoints):
    """A message of the conversation."""

    others: ClassVar = fields.MESSAGE
    role: Literal["user", "assistant", "system"] = Field(
        description="user or assistant; system for an instruction in mid-conversation."
    )
    content: str | list[Block] = Field(description="Text, or blocks.")


class ToolParam(Breakpoints):
    """A tool on offer."""

    others: ClassVar = TOOL
    model_config = ConfigDict(extra="allow", strict=True)

    type: str = Field("custom", description='"custom"; tools that a server would run are ignored.')
    name: str = Field("", description="1 to 128 letters, digits, dots, dashes or underscores.")
    description: str = Field("", description="Purpose of the tool, for the model.")
    input_schema: dict[str, Any] | None = Field(None, description="JSON Schema of the input.")
    strict: bool = Field(False, description="The input fits the schema once a call begins.")


class ChoiceParam(Body):
    """Whether and what the model must call."""

    others: ClassVar = CHOICE
    type: Literal["auto", "any", "tool", "none"] = Field(description='"any" or "tool" force a call')
    name: str | None = Field(None, description='The tool of type "tool".')
    disable_parallel_tool_use: bool = Field(False, description="At most one call.")


class OutputFormat(Body):
    """Form of the output."""

    others: ClassVar = fields.SCHEMA
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema", description="JSON Schema.")


class OutputConfig(Body):
    """Form of the output, and hints."""

    others: ClassVar = OUTPUT
    format: OutputFormat | None = Field(None, description="JSON of a schema.")


class CountBody(Body):
    """`/v1/messages/count_tokens`; the fields of a prompt."""

    others: ClassVar = BODY
    model: str = Field(description="Id of a model.")
    messages: list[MessageParam] = Field(
        description="At least one. If the last is the assistant's, the answer continues it."
    )
    system: str | list[Block] | None = Field(None, description="Instructions: text, or blocks.")
    tools: list[ToolParam] | None = Field(None, description="At most 128.")
    tool_choice: ChoiceParam | None = Field(None, description="Whether the model must call a tool.")
    output_config: OutputConfig | None = Field(None, description="Form of the output.")
    output_format: OutputFormat | None = Field(None, description="As `output_config.format`.")
    cache_control: CacheControl | None = Field(
        None, description="The whole prompt stays in the cache for a time."
    )
    prompt_cache_key: str | None = Field(
        None, description="Name of a session; the header `x-prompt-cache-key` gives it as well."
    )


class MessagesBody(CountBody):
    """`/v1/messages`."""

    max_tokens: Int = Field(
        ge=1, description="Most output tokens; lowered to the room that the prompt leaves."
    )
    temperature: float | None = Field(None, description="0 is greedy. Default 1.")
    top_p: float | None = Field(None, description="As in `/v1/chat/completions`.")
    top_k: Int | None = Field(None, description="As in `/v1/chat/completions`.")
    seed: Int | None = Field(None, description="As in `/v1/chat/completions`.")
    stop_sequences: list[str] | None = Field(None, description="Strings that end the output.")
    speculation: Speculation | None = Field(
        None, description="As in `/v1/chat/completions`; changes no token."
    )
    stream: bool = Field(False, description="Answer in server-sent events.")
