"""Fields of the API in three classes, in one table that is also the documentation.

honoured: a field of `bodies` or `messages`; it changes the answer as its description says.
no effect: listed here with `hint`; every value is taken, since the answer is the same without it.
refused: listed here with `refused`; the answer would be other than asked. Values that ask for
    nothing (`echo` false, `best_of` 1) are taken.

Any name outside of the table is refused too. /openapi.json shows the class of each field as
`x-class`. Knows names and values; knows nothing of what honoured fields do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

Json = dict[str, Any]

NOTHING: tuple[Any, ...] = (False, "", [], {})
"""Values by which clients say "not given"."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How a field that is not honoured is treated.

    Attributes:
        words: why its value changes nothing, or what it would change.
        neutral: the values that are taken; None for all of them. null always is.
    """

    words: str
    neutral: tuple[Any, ...] | None

    def takes(self, value: Any) -> bool:  # noqa: ANN401
        """Whether the answer is the same with this value as without the field."""
        if self.neutral is None:
            return True
        return any(
            value == one and isinstance(value, bool) == isinstance(one, bool)
            for one in self.neutral
        )

    def schema(self) -> Json:
        """The field in a JSON Schema."""
        if self.neutral is None:
            return {"description": f"No effect: {self.words}", "x-class": "no effect"}
        return {
            "enum": [None, *self.neutral],
            "description": f"Refused: {self.words}",
            "x-class": "refused",
        }


def hint(words: str) -> Rule:
    """A field that changes no token, whatever its value."""
    return Rule(words, None)


def refused(words: str, *neutral: Any) -> Rule:  # noqa: ANN401
    """A field whose values change the answer, but for those that ask for nothing."""
    return Rule(words, neutral)


def invalid(param: str, message: str, code: str = "invalid_value") -> PydanticCustomError:
    """The error of a validator that looks at several fields, naming the one at fault.

    Args:
        param: the field, from the object that is validated.
        message: field, limit, value, remedy.
        code: see `InvalidRequest`.
    """
    # pydantic would read braces as places for values
    return PydanticCustomError("field", "{words}", {"words": message, "param": param, "code": code})


def _integral(value: Any) -> Any:  # noqa: ANN401
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_integral)]
"""A whole number, however it is written: languages with one kind of number write 8.0."""


class Body(BaseModel):
    """A JSON object of known fields; a field given as null is one not given.

    Attributes:
        others: the fields that are not honoured.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    others: ClassVar[Mapping[str, Rule]] = {}

    @model_validator(mode="before")
    @classmethod
    def _honoured(cls, data: Any) -> Any:  # noqa: ANN401
        """Only the fields that are honoured, and names outside of the table."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            rule = cls.others.get(name)
            if value is None:
                continue
            if rule is None:
                kept[name] = value
            elif not rule.takes(value):
                raise invalid(
                    name,
                    f"`{name}` is not supported: {rule.words}; leave it out",
                    "unsupported_parameter",
                )
        return kept

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> Json:
        """The schema, with the class of each field."""
        schema = handler(core_schema)
        whole = handler.resolve_ref_schema(schema)
        properties = whole.setdefault("properties", {})
        for field in properties.values():
            field["x-class"] = "honoured"
        for name, rule in cls.others.items():
            properties[name] = rule.schema()
        return schema


_REASONING = "for models that reason before they answer; Llama models do not."
_BEAM = "for beam search, which there is none of."
_OWN_GRAMMAR = "the grammars' own white space and compiler are used"
_LORA = "adapters cannot be chosen by request"

GENERATION: Mapping[str, Rule] = {
    # notes of the caller, for its own records
    "user": hint("the caller's own name for its user."),
    "metadata": hint("the caller's own notes."),
    "store": hint("answers are not stored."),
    "safety_identifier": hint("the caller's own name for its user."),
    "request_id": hint("a name for logs; the header `x-request-id` gives one."),
    "rid": hint("a name for logs; the header `x-request-id` gives one."),
    "session_id": hint("a name for logs."),
    "trace": hint("the caller's own notes."),
    "tags": hint("the caller's own notes."),
    "client_metadata": hint("the caller's own notes."),
    "conversation_id": hint("the caller's own notes."),
    "chat_id": hint("the caller's own notes."),
    "thread_id": hint("the caller's own notes."),
    "headers": hint("meant for the client's own library."),
    "extra_headers": hint("meant for the client's own library."),
    "extra_query": hint("meant for the client's own library."),
    "intent": hint("the editor's own notes."),
    "snippy": hint("the editor's own notes."),
    # how a service would run it
    "service_tier": hint("there is one tier."),
    "provider": hint("there is one provider."),
    "route": hint("there is one provider."),
    "keep_alive": hint("models stay loaded."),
    "prompt_cache_key": hint("prompts are found in the cache by their tokens."),
    "prompt_cache_retention": hint("prompts are found in the cache by their tokens."),
    "prompt_cache_options": hint("prompts are found in the cache by their tokens."),
    "cache_prompt": hint("prompts are found in the cache by their tokens."),
    "cache_control": hint("prompts are found in the cache by their tokens."),
    "id_slot": hint("a hint where to compute it."),
    "slot_id": hint("a hint where to compute it."),
    "prediction": hint("a guess at the answer, which makes it faster elsewhere."),
    "moderation": refused("there is no moderation of requests"),
    # what such a model does not have
    "reasoning_effort": hint(_REASONING),
    "reasoning": hint(_REASONING),
    "reasoning_format": hint(_REASONING),
    "include_reasoning": hint(_REASONING),
    "separate_reasoning": hint(_REASONING),
    "stream_reasoning": hint(_REASONING),
    "thinking": hint(_REASONING),
    "thinking_budget": hint(_REASONING),
    "thinking_token_budget": hint(_REASONING),
    "enable_thinking": hint(_REASONING),
    "verbosity": hint("for models that were trained to obey it; Llama models were not."),
    # vLLM, SGLang
    "guided_decoding_backend": hint(f"{_OWN_GRAMMAR}."),
    "length_penalty": hint(_BEAM),
    "early_stopping": hint(_BEAM),
    "spaces_between_special_tokens": hint("Llama's tokenizers put none."),
    "use_beam_search": refused("there is no beam search", False),
    "guided_whitespace_pattern": refused(_OWN_GRAMMAR, ""),
    "guided_json_object": refused('give `response_format` {"type": "json_object"}', False),
    "truncate_prompt_tokens": refused("prompts are never cut"),
    "prompt_logprobs": refused("only `/v1/completions` with `echo` gives those of the prompt"),
    "bad_words": refused("give `banned_token_ids` or `logit_bias`", *NOTHING),
    "logits_processors": refused("no code of callers is run", *NOTHING),
    "custom_logit_processor": refused("no code of callers is run", *NOTHING),
    "return_tokens_as_token_ids": refused("tokens are given as text", False),
    "return_token_ids": refused("tokens are given as text", False),
    "return_hidden_states": refused("they are not kept", False),
    "kv_transfer_params": refused("groups exchange blocks by themselves", *NOTHING),
    "vllm_xargs": refused("they mean nothing here", *NOTHING),
    "mm_processor_kwargs": refused("images are read as the checkpoint says", *NOTHING),
    "media_io_kwargs": refused("images are read as the checkpoint says", *NOTHING),
    "lora_path": refused(_LORA, *NOTHING),
    "lora_name": refused(_LORA, *NOTHING),
    "adapter_id": refused(_LORA, *NOTHING),
    "regex": refused("give `structured_outputs.regex`", ""),
    "ebnf": refused("give `structured_outputs.grammar`", ""),
    "grammar": refused("give `structured_outputs.grammar`", ""),
    "json_schema": refused("give `response_format`", *NOTHING),
    # llama.cpp and its clients: samplers that are off
    "repeat_penalty": refused("give `repetition_penalty`", 1),
    "repeat_last_n": refused("penalties look at all tokens", -1),
    "typical_p": refused("give `top_p` or `min_p`", 1),
    "tfs_z": refused("give `top_p` or `min_p`", 1),
    "tfs": refused("give `top_p` or `min_p`", 1),
    "top_a": refused("give `top_p` or `min_p`", 0),
    "top_n_sigma": refused("give `top_p` or `min_p`", -1, 0),
    "mirostat": refused("give `top_p` or `min_p`", *NOTHING, 0),
    "mirostat_mode": refused("give `top_p` or `min_p`", *NOTHING, 0),
    "mirostat_tau": hint("of `mirostat`, which must be off."),
    "mirostat_eta": hint("of `mirostat`, which must be off."),
    "dynatemp_range": refused("give `temperature`", 0),
    "dynatemp_exponent": hint("of `dynatemp_range`, which must be 0."),
    "xtc_probability": refused("give `top_p` or `min_p`", 0),
    "xtc_threshold": hint("of `xtc_probability`, which must be 0."),
    "dry_multiplier": refused("give `repetition_penalty`", 0),
    "dry_base": hint("of `dry_multiplier`, which must be 0."),
    "dry_allowed_length": hint("of `dry_multiplier`, which must be 0."),
    "dry_penalty_last_n": hint("of `dry_multiplier`, which must be 0."),
    "dry_sequence_breakers": hint("of `dry_multiplier`, which must be 0."),
    "no_repeat_ngram_size": refused("give `repetition_penalty`", 0),
    "do_sample": refused("give `temperature`", True),
    "num_beams": refused("there is no beam search", 1),
    "watermark": refused("answers carry none", False),
    "truncate": refused("prompts are never cut"),
    "context_length_exceeded_behavior": refused("prompts are never cut", "error"),
    "transforms": refused("prompts are never cut", *NOTHING),
    "safe_prompt": refused("nothing is put before the prompt", False),
}
"""Of both ways to generate."""

CHAT: Mapping[str, Rule] = {
    **GENERATION,
    "modalities": refused("answers are text", ["text"], []),
    "audio": refused("answers are text"),
    "web_search_options": refused("nothing is searched"),
    "functions": refused("give `tools`", []),
    "function_call": refused("give `tools` and `tool_choice`", "none", "auto"),
    "plugins": refused("nothing runs beside the model", *NOTHING),
    "data_sources": refused("nothing is searched", *NOTHING),
    "search_parameters": refused("nothing is searched"),
    "echo": refused("only `/v1/completions` gives the prompt back", False),
    "add_special_tokens": refused("the chat template writes them", False),
    "chat_template": refused("the checkpoint's own is used"),
    "best_of": refused("give `n`", 1),
    "tool_call_parser": hint("every form of calls is found."),
    "input_audio": refused("the model does not hear"),
}
"""`/v1/chat/completions`."""

COMPLETION: Mapping[str, Rule] = {
    **GENERATION,
    "suffix": refused("the model was not trained to fill in", ""),
    "prompt_embeds": refused("prompts are text or token ids", *NOTHING),
}
"""`/v1/completions`."""

STREAM_OPTIONS: Mapping[str, Rule] = {
    "include_obfuscation": hint("events are not padded."),
    "continuous_usage_stats": hint("the usage comes once, at the end."),
}

_KEPT = "what a client keeps beside an earlier answer."
MESSAGE: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            *("reasoning_content", "reasoning", "reasoning_details", "reasoning_signature"),
            *("thinking", "thinking_blocks", "encrypted_content", "provider_specific_fields"),
            *("provider_data", "provider_metadata", "providerMetadata", "providerOptions"),
            *("annotations", "citations", "search_results", "executed_tools", "parsed"),
            *("truncated_tool_call", "additional_kwargs", "response_metadata", "extra_content"),
            *("id", "index", "created", "created_at", "createdAt", "timestamp", "model", "status"),
            *("finish_reason", "stop_reason", "logprobs", "usage", "usage_metadata", "metadata"),
            *("content_filter_results", "token_ids", "matched_stop", "hidden_states", "tool_name"),
            *("is_error", "artifact", "cache_control", "copilot_cache_control"),
            *("prompt_cache_breakpoint", "opts", "cycle", "visible", "_meta", "tag", "session_id"),
        ),
        hint(_KEPT),
    ),
    "audio": refused("the model does not hear"),
    "images": refused("give them as parts of `content`", []),
    "prefix": refused("give `continue_final_message`", False),
    "partial": refused("give `continue_final_message`", False),
}
"""A message of a conversation."""

CALL: Mapping[str, Rule] = dict.fromkeys(
    (
        *("index", "provider_specific_fields", "extra_content", "thought_signature", "status"),
        *("caller", "cache_control", "parsed_arguments", "output"),
    ),
    hint(_KEPT),
)
"""A call in a message, and its function."""

PART: Mapping[str, Rule] = dict.fromkeys(
    (
        *("cache_control", "prompt_cache_breakpoint", "annotations", "citations", "logprobs"),
        *("copilot_cache_control", "_meta"),
        *("id", "index", "uuid", "provider_specific_fields", "providerOptions", "signature"),
        *("extra_content", "thought_signature", "metadata", "status", "detail"),
    ),
    hint(_KEPT),
)
"""A part of a message."""

IMAGE: Mapping[str, Rule] = {
    "detail": hint("images are always read in full."),
    "format": hint("the file itself says what it is."),
    "mime_type": hint("the file itself says what it is."),
}

TOOL: Mapping[str, Rule] = dict.fromkeys(
    (
        *("cache_control", "copilot_cache_control", "defer_loading", "eager_input_streaming"),
        *("allowed_callers", "metadata"),
    ),
    hint("how a service would show or store the tool; the model sees all tools at once."),
)
"""A tool, and its function."""

SCHEMA: Mapping[str, Rule] = {
    "name": hint("for the caller."),
    "description": hint("for the caller."),
    "strict": hint("the output always fits the schema, as if true."),
}

STRUCTURED: Mapping[str, Rule] = {
    "disable_fallback": hint("there is one compiler of grammars."),
    "backend": hint("there is one compiler of grammars."),
    "disable_any_whitespace": refused(_OWN_GRAMMAR, False),
    "disable_additional_properties": refused("give it in the schema", False),
    "whitespace_pattern": refused(_OWN_GRAMMAR, ""),
    "structural_tag": refused("give `strict` tools", ""),
}

TOKENIZE: Mapping[str, Rule] = {
    "user": GENERATION["user"],
    "request_id": GENERATION["request_id"],
    "return_token_strs": refused("ask `/detokenize`", False),
    "chat_template": CHAT["chat_template"],
    "mm_processor_kwargs": GENERATION["mm_processor_kwargs"],
    "media_io_kwargs": GENERATION["media_io_kwargs"],
}
