"""The JSON that clients send: every field with its limits and meaning, and no other taken.

Sampling fields carry the API's own names where it has one, and the engine's where it has none. A
field given as null is one not given. Knows JSON; what a value means to the model is checked where
gRPC's is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_PROMPTS = 128


class Body(BaseModel):
    """A JSON object of known fields."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:  # noqa: ANN401
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = Field(
        False, description="Send one more event before the end: no choices, but the usage."
    )


class NamedSchema(Body):
    """A JSON Schema with a name."""

    name: str = Field("", description="For the caller; unused.")
    description: str = Field("", description="For the caller; unused.")
    json_schema: dict[str, Any] = Field(alias="schema", description="JSON Schema.")
    strict: bool | None = Field(None, description="Output always fits the schema, as if true.")


class ResponseFormat(Body):
    """The shape of the output."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Free text, any JSON object, or JSON that fits `json_schema`."
    )
    json_schema: NamedSchema | None = Field(None, description='With type "json_schema".')

    @model_validator(mode="after")
    def _agree(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('`json_schema` and type "json_schema" go together; give both')
        return self


class StructuredOutputs(Body):
    """What the output must fit, in the names that vLLM's clients use; exactly one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="JSON Schema.")
    json_object: Literal[True] | None = Field(None, description="Any JSON object.")
    regex: str | None = Field(None, description="A regular expression, without look-around.")
    choice: list[str] | None = Field(None, description="One of these texts.")
    grammar: str | None = Field(None, description="A Lark grammar; its first rule is `start`.")

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise ValueError(
                "give exactly one of `json`, `json_object`, `regex`, `choice`, `grammar`"
            )
        return self


class Sampling(Body):
    """What `/v1/chat/completions` and `/v1/completions` share."""

    model: str = Field("", description="Id of a model; may stay empty when only one is served.")
    temperature: float | None = Field(None, description="0 is greedy; up to 100. Default 1.")
    top_p: float | None = Field(None, description="Smallest set of tokens of this mass.")
    top_k: int | None = Field(None, description="The k likeliest tokens; 0 is off.")
    min_p: float | None = Field(None, description="Drop tokens below this part of the likeliest.")
    repetition_penalty: float | None = Field(
        None, description="Divides logits of tokens seen in prompt and output; 0.01 to 100."
    )
    presence_penalty: float | None = Field(
        None, description="Subtracted once from tokens in the output; -2 to 2."
    )
    frequency_penalty: float | None = Field(
        None, description="Subtracted for each occurrence in the output; -2 to 2."
    )
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], float] | None = Field(
        None, description="Token id to a number added to its logit, -100 to 100."
    )
    allowed_token_ids: list[int] | None = Field(None, description="Nothing else may be drawn.")
    banned_token_ids: list[int] | None = Field(None, description="Never drawn.")
    seed: int | None = Field(
        None, description="0 to 2^63 - 1. The same seed gives the same tokens. Default: drawn."
    )
    n: int | None = Field(None, description="Samples of the same prompt, 1 to 128. Default 1.")
    max_tokens: int | None = Field(
        None, description="Most output tokens. Default: what the context has room for."
    )
    min_tokens: int | None = Field(
        None, description="Stop tokens are banned until so many tokens are out."
    )
    stop: str | list[str] | None = Field(
        None, description="Strings that end the output, at most 16; no part of one is sent."
    )
    include_stop: bool | None = Field(None, description="Send the stop string as well.")
    stop_token_ids: list[int] | None = Field(None, description="Tokens that end the output.")
    ignore_eos: bool | None = Field(None, description="The model's end tokens do not end it.")
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text. Default true."
    )
    priority: int | None = Field(None, description="Lower goes first. Default 0.")
    stream: bool = Field(False, description="Answer in server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    response_format: ResponseFormat | None = Field(
        None, description="What the output is: text, a JSON object, or JSON of a schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="What the output must fit; instead of `response_format`."
    )
    guided_json: dict[str, Any] | str | None = Field(
        None, description="The same as `structured_outputs.json`."
    )
    guided_regex: str | None = Field(None, description="The same as `structured_outputs.regex`.")
    guided_choice: list[str] | None = Field(
        None, description="The same as `structured_outputs.choice`."
    )
    guided_grammar: str | None = Field(
        None, description="The same as `structured_outputs.grammar`."
    )
    user: str | None = Field(
        None, description="The caller's own name for its user; taken for compatibility, unused."
    )

    @model_validator(mode="after")
    def _only_streams(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is for streams; set `stream`, or leave it out")
        return self


class ImageUrl(Body):
    """An image, in its URL."""

    url: str = Field(description="data:image/…;base64,…: JPEG, PNG or WebP. None are fetched.")
    detail: Literal["auto", "high"] | None = Field(
        None, description="Images are always read in full."
    )


class ContentPart(BaseModel):
    """A part of a message; parts of the types "text" and "image_url" are taken."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None
    image_url: ImageUrl | None = Field(None, description="For models that read images.")


class FunctionCall(Body):
    """The function of a tool call."""

    name: str
    arguments: str = Field(description="A JSON object, as text.")


class MessageToolCall(Body):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One message of a conversation."""

    role: str = Field(description="system, developer, user, assistant or tool.")
    content: str | list[ContentPart] | None = Field(
        None, description="Text, or parts: text and images."
    )
    name: str | None = Field(None, description="The speaker's or the tool's name.")
    tool_calls: list[MessageToolCall] | None = Field(None, description="Calls made by it.")
    tool_call_id: str | None = Field(None, description='The call that a "tool" message answers.')


class Function(Body):
    """A function on offer."""

    name: str = Field(description="1 to 128 letters, digits, dots, dashes or underscores.")
    description: str = Field("", description="What it does, for the model.")
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of its arguments.")
    strict: bool = Field(
        False,
        description="Arguments must fit the schema: only where `tool_choice` forces a call, where "
        "they always do.",
    )


class Tool(Body):
    """A tool on offer."""

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


class ChatBody(Sampling):
    """`/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(description="At least one.")
    max_completion_tokens: int | None = Field(None, description="The same as `max_tokens`.")
    logprobs: bool = Field(False, description="Give each output token's log-probability.")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Alternatives at each position, 0 to 20; needs `logprobs`."
    )
    tools: list[Tool] | None = Field(None, description="What the model may call; at most 128.")
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = Field(
        None, description='"none" hides the tools; "required" or a named one forces a call.'
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false ends the output with its first call. Default true."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Open the assistant's turn after the last message. Default true."
    )
    continue_final_message: bool | None = Field(
        None, description="Go on with the last message instead of answering it."
    )
    documents: list[Document] | None = Field(
        None, description="Texts to answer from, at most 128, if the model's template shows them."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="More variables for the template, such as `date_string`."
    )

    @model_validator(mode="after")
    def _agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`; set it, or leave this out")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("`max_tokens` and `max_completion_tokens` mean the same; give one")
        if self.tool_choice in (None, "auto"):
            if any(tool.function.strict for tool in self.tools or ()):
                raise ValueError(
                    '`strict` tools need a forced call; set `tool_choice` to "required" or to a '
                    "named tool, or leave `strict` out"
                )
        return self


class CompletionBody(Sampling):
    """`/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description=f"Text or token ids, or a list of either: at most {MAX_PROMPTS} prompts."
    )
    echo: bool = Field(False, description="Give the prompt back before the output.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Log-probabilities of tokens and of so many alternatives, 0 to 20."
    )
    add_special_tokens: bool | None = Field(
        None, description="Begin text prompts as the tokenizer does by itself. Default true."
    )
    best_of: int | None = Field(None, description="Only as much as `n`.")

    @model_validator(mode="after")
    def _prompts(self) -> CompletionBody:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("`best_of` is not supported unless it equals `n`; leave it out")
        if isinstance(self.prompt, list) and len(self.prompt) > MAX_PROMPTS:
            if not isinstance(self.prompt[0], int):
                raise ValueError(f"`prompt` has more than {MAX_PROMPTS} entries; send fewer")
        return self


class TokenizeBody(Body):
    """`/tokenize`: a text, or a conversation."""

    model: str = Field("", description="Id of a model; may stay empty when only one is served.")
    prompt: str | None = Field(None, description="A text; or else `messages`.")
    messages: list[ChatMessage] | None = Field(None, description="A conversation.")
    tools: list[Tool] | None = Field(None, description="Tools of the conversation.")
    add_special_tokens: bool | None = Field(None, description="For a text. Default true.")
    add_generation_prompt: bool | None = Field(None, description="For a conversation.")
    continue_final_message: bool | None = Field(None, description="For a conversation.")
    documents: list[Document] | None = Field(None, description="For a conversation.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="For a conversation.")

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        return self


class DetokenizeBody(Body):
    """`/detokenize`."""

    model: str = Field("", description="Id of a model; may stay empty when only one is served.")
    tokens: list[int] = Field(description="Token ids.")
    skip_special_tokens: bool = Field(False, description="Leave special tokens out.")
