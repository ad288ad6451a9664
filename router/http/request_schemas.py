"""The JSON of requests: every honoured field with its limits and meaning.

`fields` lists the fields without effect and the refused fields; `messages` has the schemas of
conversations. Sampling fields have the names of the OpenAI API, or else the engine's names. null
means that a field is absent. Knows JSON; knows nothing of the model: checks against the model are
shared with gRPC.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from arriero.router.http import fields
from arriero.router.http.cache_fields import CacheControl, SessionFields
from arriero.router.http.fields import Body, Int, invalid
from arriero.router.http.messages import ChatMessage, Document, Tool, ToolChoice, ToolEntry

MAX_PROMPTS = 128


class StreamOptions(Body):
    """Further contents of a stream."""

    others: ClassVar = fields.STREAM_OPTIONS
    include_usage: bool = Field(
        False, description="Send the usage in one more event, without choices, before the end."
    )


class NamedSchema(Body):
    """A JSON Schema with a name."""

    others: ClassVar = fields.SCHEMA
    json_schema: dict[str, Any] = Field(alias="schema", description="JSON Schema.")


class ResponseFormat(Body):
    """Form of the output."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Free text, any JSON object, or JSON that fits `json_schema`."
    )
    json_schema: NamedSchema | None = Field(None, description='With type "json_schema".')

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, data: Any) -> Any:  # noqa: ANN401
        """Translate a bare `schema` beside `type`, as several servers accept, to this API."""
        if not isinstance(data, dict) or data.get("json_schema") is not None:
            return data
        if data.get("type") not in ("json_object", "json_schema") or data.get("schema") is None:
            return data
        left = {name: value for name, value in data.items() if name != "schema"}
        return {**left, "type": "json_schema", "json_schema": {"schema": data["schema"]}}

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise invalid(
                "json_schema", '`json_schema` and type "json_schema" go together; give both'
            )
        return self


class StructuredOutputs(Body):
    """Form of the output in the names of vLLM; exactly one field."""

    others: ClassVar = fields.STRUCTURED
    json_: dict[str, Any] | str | None = Field(None, alias="json", description="JSON Schema.")
    json_object: Literal[True] | None = Field(None, description="Any JSON object.")
    regex: str | None = Field(None, description="A regular expression, without look-around.")
    choice: list[str] | None = Field(None, description="The texts to choose from.")
    grammar: str | None = Field(None, description="A Lark grammar; its first rule is `start`.")

    @model_validator(mode="before")
    @classmethod
    def _drop_false(cls, data: Any) -> Any:  # noqa: ANN401
        if isinstance(data, dict) and data.get("json_object") is False:
            return {name: value for name, value in data.items() if name != "json_object"}
        return data

    @model_validator(mode="after")
    def _check_single(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            given = sorted(name.removesuffix("_") for name in self.model_fields_set)
            raise invalid(
                given[-1] if given else "",
                "give exactly one of `json`, `json_object`, `regex`, `choice`, `grammar`",
            )
        return self


class Speculation(Body):
    """How tokens are drafted."""

    kind: Literal["off", "ngram", "suffix", "draft", "eagle3"] = Field(
        description='"off", or "ngram" for drafts from the request\'s own text alone; others are '
        "as the spec has."
    )


class PredictionPart(Body):
    """A part of a predicted output."""

    type: Literal["text"] = "text"
    text: str


class Prediction(Body):
    """A predicted output, in OpenAI's form."""

    type: Literal["content"] = "content"
    content: str | list[PredictionPart]

    @property
    def text(self) -> str:
        """The whole text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Sampling(SessionFields):
    """Fields of `/v1/chat/completions` and `/v1/completions`."""

    others: ClassVar = fields.GENERATION
    model: str = Field("", description="Id of a model; may be empty when a single model is served.")
    temperature: float | None = Field(None, description="0 is greedy; up to 100. Default 1.")
    top_p: float | None = Field(
        None,
        description="Keep the smallest set of tokens of this probability mass; 0 keeps one token.",
    )
    top_k: Int | None = Field(None, description="Keep the k likeliest tokens; 0 and -1 are off.")
    min_p: float | None = Field(
        None, description="Drop tokens below this part of the likeliest token's probability."
    )
    repetition_penalty: float | None = Field(
        None, description="Divides logits of tokens in prompt and output; 0.01 to 100."
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
    allowed_token_ids: list[Int] | None = Field(
        None, description="Only these tokens may be sampled."
    )
    banned_token_ids: list[Int] | None = Field(None, description="Tokens that are never sampled.")
    seed: Int | None = Field(
        None,
        description="The same seed gives the same tokens; taken modulo 2^63. Default and -1: a "
        "random seed.",
    )
    n: Int | None = Field(None, description="Samples of the same prompt, 1 to 128. Default 1.")
    max_tokens: Int | None = Field(
        None,
        description="Most output tokens. Default and -1: the room of the context.",
    )
    min_tokens: Int | None = Field(
        None, description="Least number of output tokens; stop tokens are banned until then."
    )
    stop: str | list[str] | None = Field(
        None, description="Strings that end the output, at most 64; no part of a string is sent."
    )
    include_stop: bool | None = Field(None, description="Send the stop string as well.")
    include_stop_str_in_output: bool | None = Field(
        None, description="As `include_stop`, with vLLM's name."
    )
    stop_token_ids: list[Int] | None = Field(None, description="Tokens that end the output.")
    ignore_eos: bool | None = Field(
        None, description="The model's end tokens do not end the output."
    )
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text. Default true."
    )
    priority: Int | None = Field(None, description="Lower goes first. Default 0.")
    stream: bool = Field(False, description="Answer in server-sent events.")
    stream_options: StreamOptions | None = Field(
        None, description="Contents of a stream; an answer without `stream` always has the usage."
    )
    cache_salt: str | None = Field(
        None,
        description="Prompts share the cache only with prompts of the same salt, at most 256 bytes",
    )
    cache_control: CacheControl | None = Field(
        None, description="The whole prompt stays in the cache for a time. Changes no token."
    )
    speculation: Speculation | None = Field(
        None,
        description="How tokens are drafted, within what the model's spec has; changes no token.",
    )
    prediction: Prediction | None = Field(
        None, description="A text that the output may repeat in part; makes the answer faster."
    )
    response_format: ResponseFormat | None = Field(
        None, description="Form of the output: text, a JSON object, or JSON of a schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="Form of the output; instead of `response_format`."
    )
    return_token_ids: bool = Field(
        False, description="Give the token ids of the prompt and of the output, as vLLM does."
    )
    return_tokens_as_token_ids: bool = Field(
        False, description="Spell tokens of log-probabilities as `token_id:N`, as vLLM does."
    )
    guided_json: dict[str, Any] | str | None = Field(
        None, description="As `structured_outputs.json`."
    )
    guided_regex: str | None = Field(None, description="As `structured_outputs.regex`.")
    guided_choice: list[str] | None = Field(None, description="As `structured_outputs.choice`.")
    guided_grammar: str | None = Field(None, description="As `structured_outputs.grammar`.")

    @model_validator(mode="after")
    def _check_names(self) -> Sampling:
        if self.include_stop_str_in_output not in (None, self.include_stop):
            if self.include_stop is not None:
                raise invalid(
                    "include_stop_str_in_output",
                    "`include_stop` and `include_stop_str_in_output` mean the same; give one",
                )
        return self


class ChatBody(Sampling):
    """`/v1/chat/completions`."""

    others: ClassVar = fields.CHAT
    messages: list[ChatMessage] = Field(description="At least one.")
    max_completion_tokens: Int | None = Field(None, description="As `max_tokens`.")
    logprobs: bool = Field(False, description="Give each output token's log-probability.")
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = Field(
        None, description="Alternatives at each position, 0 to 20; above 0 needs `logprobs`."
    )
    tools: list[ToolEntry] | None = Field(
        None,
        description="Tools that the model may call; at most 128. Types that a server would run are "
        "left out, or refused by setting.",
    )
    tool_choice: ToolChoice | None = Field(
        None, description='"none" hides the tools; "required" or a named tool forces a call.'
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false ends the output after the first call. Default true."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Open the assistant's turn after the last message. Default true."
    )
    continue_final_message: bool | None = Field(
        None, description="Continue the last message instead of answering it."
    )
    documents: list[Document] | None = Field(
        None, description="Texts to answer from, at most 128, if the model's template shows them."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables for the template, such as `date_string`."
    )

    @property
    def own_tools(self) -> list[Tool]:
        """The tools that the client runs."""
        return [tool for tool in self.tools or () if isinstance(tool, Tool)]

    @model_validator(mode="after")
    def _check(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise invalid(
                "top_logprobs",
                "`top_logprobs` needs `logprobs`; set `logprobs`, or leave out `top_logprobs`",
            )
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            if self.max_tokens != self.max_completion_tokens:
                raise invalid(
                    "max_tokens",
                    "`max_tokens` and `max_completion_tokens` mean the same and differ; give one",
                )
        return self


def _count(value: Any) -> Any:  # noqa: ANN401
    return None if value is False else value


class CompletionBody(Sampling):
    """`/v1/completions`."""

    others: ClassVar = fields.COMPLETION
    prompt: str | list[Int] | list[str] | list[list[Int]] = Field(
        description=f"Text or token ids, or a list of either: at most {MAX_PROMPTS} prompts."
    )
    echo: bool = Field(
        False,
        description="Return the prompt before the output; with `max_tokens` 0, only the prompt.",
    )
    logprobs: Annotated[Annotated[Int, Field(ge=0, le=20)] | None, BeforeValidator(_count)] = Field(
        None, description="Log-probabilities of tokens and of this number of alternatives, 0 to 20."
    )
    add_special_tokens: bool | None = Field(
        None, description="Add the tokenizer's special tokens to text prompts. Default true."
    )
    best_of: Int | None = Field(None, description="Must equal `n`.")

    @property
    def prompt_only(self) -> bool:
        """Whether the client asks for the prompt and its log-probabilities alone."""
        return self.echo and self.max_tokens == 0

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionBody:
        if self.best_of not in (None, self.n or 1):
            raise invalid(
                "best_of",
                "`best_of` is not supported unless it equals `n`; leave it out",
                "unsupported_parameter",
            )
        if isinstance(self.prompt, list) and len(self.prompt) > MAX_PROMPTS:
            if not isinstance(self.prompt[0], int):
                raise invalid("prompt", f"`prompt` has more than {MAX_PROMPTS} entries; send fewer")
        return self


class TokenizeBody(Body):
    """`/tokenize`: a text, or a conversation."""

    others: ClassVar = fields.TOKENIZE
    model: str = Field("", description="Id of a model; may be empty when a single model is served.")
    prompt: str | None = Field(None, description="A text, instead of `messages`.")
    messages: list[ChatMessage] | None = Field(None, description="A conversation.")
    tools: list[ToolEntry] | None = Field(None, description="Tools of the conversation.")
    add_special_tokens: bool | None = Field(None, description="For a text. Default true.")
    add_generation_prompt: bool | None = Field(None, description="For a conversation.")
    continue_final_message: bool | None = Field(None, description="For a conversation.")
    documents: list[Document] | None = Field(None, description="For a conversation.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="For a conversation.")

    @property
    def own_tools(self) -> list[Tool]:
        """The tools that the client runs."""
        return [tool for tool in self.tools or () if isinstance(tool, Tool)]

    @model_validator(mode="after")
    def _check_input(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise invalid(
                "prompt",
                "give either `prompt` or `messages`",
                "missing_required_parameter" if self.prompt is None else "invalid_value",
            )
        if self.messages is not None and self.add_special_tokens:
            raise invalid(
                "add_special_tokens",
                "`add_special_tokens` is for `prompt`; the chat template adds the special tokens "
                "of `messages`; leave it out",
            )
        return self


class DetokenizeBody(Body):
    """`/detokenize`."""

    model: str = Field("", description="Id of a model; may be empty when a single model is served.")
    tokens: list[Int] = Field(description="Token ids.")
    skip_special_tokens: bool = Field(False, description="Leave special tokens out.")
