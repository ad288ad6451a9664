"""Fields of the API in three classes; the table is also the documentation.

honoured: a field of `request_schemas` or `messages`; changes the answer as described there.
no effect: listed here with `hint`; every value is accepted, because no value changes the answer.
refused: listed here with `refused`; the answer would differ from the request. Neutral values
    (`echo` false, `best_of` 1) are accepted.

Names outside of the table are refused too. /openapi.json shows the class of each field as
`x-class`. Knows names and values; knows nothing of the effect of honoured fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

Json = dict[str, Any]

NOTHING: tuple[Any, ...] = (False, "", [], {})
"""Values that clients send for "not given"."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Rule for a field that is not honoured.

    Attributes:
        words: reason why the field has no effect or is refused.
        neutral: accepted values; None for all values. null is always accepted.
    """

    words: str
    neutral: tuple[Any, ...] | None

    def takes(self, value: Any) -> bool:  # noqa: ANN401
        """Whether the value is accepted: the answer is the same without the field."""
        if self.neutral is None:
            return True
        return any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in self.neutral
        )

    def schema(self) -> Json:
        """JSON Schema of the field."""
        if self.neutral is None:
            return {"description": f"No effect: {self.words}", "x-class": "no effect"}
        return {
            "enum": [None, *self.neutral],
            "description": f"Refused: {self.words}",
            "x-class": "refused",
        }


def hint(words: str) -> Rule:
    """Rule for a field that changes no token."""
    return Rule(words, None)


def refused(words: str, *neutral: Any) -> Rule:  # noqa: ANN401
    """Rule for a field that would change the answer, except for its neutral values."""
    return Rule(words, neutral)


def invalid(param: str, message: str, code: str = "invalid_value") -> PydanticCustomError:
    """The error of a validator of several fields, with the name of the field at fault.

    Args:
        param: path of the field, from the validated object.
        message: field, limit, value, remedy.
        code: see `InvalidRequest`.
    """
    # pydantic would read braces as placeholders
    return PydanticCustomError("field", "{words}", {"words": message, "param": param, "code": code})


def _integral(value: Any) -> Any:  # noqa: ANN401
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_integral)]
"""A whole number; 8.0 is accepted, because languages with one number type write 8.0."""


class Body(BaseModel):
    """A JSON object of known fields; null means that the field is absent.

    Attributes:
        others: rules for the fields that are not honoured.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    others: ClassVar[Mapping[str, Rule]] = {}

    @model_validator(mode="before")
    @classmethod
    def _honoured(cls, data: Any) -> Any:  # noqa: ANN401
        """Drop the fields with a rule; keep honoured fields and names outside of the table."""
        if not isinstance(data, dict):
            return data
        honoured = {}
        for name, value in data.items():
            rule = cls.others.get(name)
            if value is None:
                continue
            if rule is None:
                honoured[name] = value
            elif not rule.takes(value):
                raise invalid(
                    name,
                    f"`{name}` is not supported: {rule.words}; leave it out",
                    "unsupported_parameter",
                )
        return honoured

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> Json:
        """JSON Schema with the class of each field."""
        schema = handler(core_schema)
        whole = handler.resolve_ref_schema(schema)
        properties = whole.setdefault("properties", {})
        for field in properties.values():
            field["x-class"] = "honoured"
        for name, rule in cls.others.items():
            properties[name] = rule.schema()
        return schema


_REASONING = "for models that reason before they answer; Llama models do not."
_BEAM = "for beam search, which is not offered."
_OWN_GRAMMAR = "the grammars' own white space and compiler are used"
_LORA = "adapters cannot be chosen by request"

GENERATION: Mapping[str, Rule] = {
    # notes for the caller's own records
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
    # hints for a service how to run the request
    "service_tier": hint("there is one tier."),
    "provider": hint("there is one provider."),
    "route": hint("there is one provider."),
    "keep_alive": hint("models stay loaded."),
    "cache_prompt": hint("prompts are found in the cache by their tokens."),
    "id_slot": hint("a hint where to compute the request."),
    "slot_id": hint("a hint where to compute the request."),
    "moderation": refused("the safety policy of the key's tenant decides; see docs/guards.md"),
    # reasoning, which Llama models lack
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
    "verbosity": hint("for models trained for verbosity levels; Llama models are not."),
    # vLLM, SGLang
    "guided_decoding_backend": hint(f"{_OWN_GRAMMAR}."),
    "length_penalty": hint(_BEAM),
    "early_stopping": hint(_BEAM),
    "spaces_between_special_tokens": hint("Llama's tokenizers add no spaces."),
    "use_beam_search": refused("there is no beam search", False),
    "guided_whitespace_pattern": refused(_OWN_GRAMMAR, ""),
    "guided_json_object": refused('give `response_format` {"type": "json_object"}', False),
    "truncate_prompt_tokens": refused("prompts are never cut"),
    "prompt_logprobs": refused(
        "only `/v1/completions` with `echo` returns log-probabilities of the prompt"
    ),
    "bad_words": refused("give `banned_token_ids` or `logit_bias`", *NOTHING),
    "logits_processors": refused("code from callers is not run", *NOTHING),
    "custom_logit_processor": refused("code from callers is not run", *NOTHING),
    "return_hidden_states": refused("hidden states are not returned", False),
    "kv_transfer_params": refused("groups exchange blocks by themselves", *NOTHING),
    "vllm_xargs": refused("vLLM's own arguments are unknown here", *NOTHING),
    "mm_processor_kwargs": refused("the checkpoint decides how images are read", *NOTHING),
    "media_io_kwargs": refused("the checkpoint decides how images are read", *NOTHING),
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
    "mirostat_tau": hint("belongs to `mirostat`, which must be off."),
    "mirostat_eta": hint("belongs to `mirostat`, which must be off."),
    "dynatemp_range": refused("give `temperature`", 0),
    "dynatemp_exponent": hint("belongs to `dynatemp_range`, which must be 0."),
    "xtc_probability": refused("give `top_p` or `min_p`", 0),
    "xtc_threshold": hint("belongs to `xtc_probability`, which must be 0."),
    "dry_multiplier": refused("give `repetition_penalty`", 0),
    "dry_base": hint("belongs to `dry_multiplier`, which must be 0."),
    "dry_allowed_length": hint("belongs to `dry_multiplier`, which must be 0."),
    "dry_penalty_last_n": hint("belongs to `dry_multiplier`, which must be 0."),
    "dry_sequence_breakers": hint("belongs to `dry_multiplier`, which must be 0."),
    "no_repeat_ngram_size": refused("give `repetition_penalty`", 0),
    "do_sample": refused("give `temperature`", True),
    "num_beams": refused("there is no beam search", 1),
    "watermark": refused("answers carry no watermark", False),
    "truncate": refused("prompts are never cut"),
    "context_length_exceeded_behavior": refused("prompts are never cut", "error"),
    "transforms": refused("prompts are never cut", *NOTHING),
    "safe_prompt": refused("no system prompt is added", False),
}
"""`/v1/chat/completions` and `/v1/completions`."""

CHAT: Mapping[str, Rule] = {
    **GENERATION,
    "modalities": refused("answers are text", ["text"], []),
    "audio": refused("answers are text"),
    "web_search_options": refused("nothing is searched"),
    "functions": refused("give `tools`", []),
    "function_call": refused("give `tools` and `tool_choice`", "none", "auto"),
    "plugins": refused("no plugin runs beside the model", *NOTHING),
    "data_sources": refused("nothing is searched", *NOTHING),
    "search_parameters": refused("nothing is searched"),
    "echo": refused("only `/v1/completions` returns the prompt", False),
    "add_special_tokens": refused("the chat template adds special tokens", False),
    "chat_template": refused("the checkpoint's own template is used"),
    "best_of": refused("give `n`", 1),
    "tool_call_parser": hint("calls of every form are parsed."),
    "input_audio": refused("the model does not take audio"),
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
    "continuous_usage_stats": hint("the usage is sent once, at the end."),
}

_OF_CLIENT = "a client's own record of an earlier answer."
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
            *("is_error", "artifact", "copilot_cache_control", "opts", "cycle", "visible"),
            *("_meta", "tag", "session_id"),
        ),
        hint(_OF_CLIENT),
    ),
    "audio": refused("the model does not take audio"),
    "images": refused("give images as parts of `content`", []),
    "prefix": refused("give `continue_final_message`", False),
    "partial": refused("give `continue_final_message`", False),
}
"""A message of a conversation."""

CALL: Mapping[str, Rule] = dict.fromkeys(
    (
        *("index", "provider_specific_fields", "extra_content", "thought_signature", "status"),
        *("caller", "cache_control", "parsed_arguments", "output"),
    ),
    hint(_OF_CLIENT),
)
"""A call in a message, and its function."""

PART: Mapping[str, Rule] = dict.fromkeys(
    (
        *("annotations", "citations", "logprobs", "copilot_cache_control", "_meta"),
        *("id", "index", "uuid", "provider_specific_fields", "providerOptions", "signature"),
        *("extra_content", "thought_signature", "metadata", "status", "detail"),
    ),
    hint(_OF_CLIENT),
)
"""A part of a message."""

IMAGE: Mapping[str, Rule] = {
    "detail": hint("images are always read in full."),
    "format": hint("the format is read from the file."),
    "mime_type": hint("the format is read from the file."),
}

TOOL: Mapping[str, Rule] = dict.fromkeys(
    (
        *("copilot_cache_control", "defer_loading", "eager_input_streaming"),
        *("allowed_callers", "metadata"),
    ),
    hint("a hint how to show or store the tool; the model sees all tools at once."),
)
"""A tool, and its function."""

SCHEMA: Mapping[str, Rule] = {
    "name": hint("for the caller."),
    "description": hint("for the caller."),
    "strict": hint("the output always fits the schema."),
}

STRUCTURED: Mapping[str, Rule] = {
    "disable_fallback": hint("there is one compiler of grammars."),
    "backend": hint("there is one compiler of grammars."),
    "disable_any_whitespace": refused(_OWN_GRAMMAR, False),
    "disable_additional_properties": refused("set `additionalProperties` in the schema", False),
    "whitespace_pattern": refused(_OWN_GRAMMAR, ""),
    "structural_tag": refused("give `strict` tools", ""),
}

TOKENIZE: Mapping[str, Rule] = {
    "user": GENERATION["user"],
    "request_id": GENERATION["request_id"],
    "return_token_strs": refused("use `/detokenize`", False),
    "chat_template": CHAT["chat_template"],
    "mm_processor_kwargs": GENERATION["mm_processor_kwargs"],
    "media_io_kwargs": GENERATION["media_io_kwargs"],
}
