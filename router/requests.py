"""What a client asks, read from the wire and checked: every refusal is made here.

Knows the wire's messages, limits and a model's card; knows nothing of streams or groups.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from arriero.router.card import ModelCard
from arriero.router.grammar import MAX_CALLS, calls_grammar, read_grammar
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.stop import check_stops
from arriero.shards.engine.types import EngineRequest
from arriero.shards.errors import InvalidRequest
from arriero.shards.sampling import SamplingParams

M = TypeVar("M", bound=Message)

MAX_TOOLS = 128
MAX_JSON_DEPTH = 64
"""Deepest nesting of a tool's schema or a call's arguments."""
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_OPTIONAL = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputOptions:
    """What to send back, and when to stop besides tokens; the fields are the wire's."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    include_text: bool = True
    include_token_ids: bool = True
    include_prompt_token_ids: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolOffer:
    """The tools that a request offers, and how calls of them are taken.

    Attributes:
        tools: as templates take them.
        parallel: whether there may be several calls; else the first one ends the output.
        grammar: makes the output calls and nothing else; None lets the model decide.
    """

    tools: tuple[Mapping[str, Any], ...]
    parallel: bool = True
    grammar: str | None = None

    @property
    def names(self) -> list[str]:
        """What the tools are called."""
        return [tool["function"]["name"] for tool in self.tools]


def parse(kind: type[M], raw: bytes) -> M:
    """The message in `raw`.

    Raises:
        InvalidRequest: the bytes are no such message, or a string in it is not UTF-8.
    """
    message = kind()
    try:
        message.ParseFromString(raw)
    except DecodeError:
        raise InvalidRequest(
            "",
            f"the {len(raw)} bytes are not a {kind.DESCRIPTOR.full_name}: malformed, or a string "
            "that is not UTF-8",
        ) from None
    return message


def read_request_id(given: str) -> str:
    """The caller's name for the request, or a new one."""
    if not given:
        return f"req-{secrets.token_hex(12)}"
    if not _REQUEST_ID.fullmatch(given):
        raise InvalidRequest(
            "request_id", "`request_id` must be 1 to 128 printable ASCII characters without spaces"
        )
    return given


def read_sampling(message: pb.SamplingParams, card: ModelCard) -> SamplingParams:
    """Checked sampling parameters, a seed among them; `max_tokens` may still be None.

    Raises:
        InvalidRequest: a field breaks its limit.
    """
    fields: dict[str, Any] = {}
    for name, value in card.generation_defaults.items():
        fields[name] = max(int(value), 0) if name == "top_k" else float(value)
    for name in _OPTIONAL:
        if message.HasField(name):  # type: ignore[arg-type]  # the stubs want a literal
            fields[name] = getattr(message, name)
    if message.HasField("allowed_token_ids"):
        fields["allowed_token_ids"] = tuple(message.allowed_token_ids.ids)
    params = SamplingParams(
        **fields,
        logit_bias=dict(message.logit_bias),
        banned_token_ids=tuple(message.banned_token_ids),
        stop_token_ids=tuple(message.stop_token_ids),
    )
    if message.HasField("grammar"):
        params = replace(params, grammar=read_grammar(message.grammar))
    params.check(vocab_size=card.vocab_size)
    if params.seed is None:
        params = replace(params, seed=secrets.randbits(63))
    return params


def read_options(message: pb.Options) -> OutputOptions:
    """Checked output options.

    Raises:
        InvalidRequest: a stop string breaks its limits, or has no text to be found in.
    """
    options = OutputOptions(
        stop=tuple(message.stop),
        include_stop=message.include_stop,
        skip_special_tokens=_default(message, "skip_special_tokens", True),
        include_text=_default(message, "include_text", True),
        include_token_ids=_default(message, "include_token_ids", True),
        include_prompt_token_ids=message.include_prompt_token_ids,
    )
    check_stops(options.stop)
    if options.stop and not options.include_text:
        raise InvalidRequest(
            "include_text", "`stop` needs text; leave `include_text` on or `stop` out"
        )
    return options


def read_messages(messages: Sequence[pb.Message]) -> list[dict[str, Any]]:
    """A conversation as templates take it.

    Raises:
        InvalidRequest: a call's arguments are no JSON object.
    """
    read = []
    for number, message in enumerate(messages):
        one: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name:
            one["name"] = message.name
        if message.tool_call_id:
            one["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            where = f"messages[{number}].tool_calls"
            one["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": _json_object(f"{where}[{at}].arguments", call.arguments),
                    },
                }
                for at, call in enumerate(message.tool_calls)
            ]
        read.append(one)
    return read


def read_tools(tools: Sequence[pb.Tool]) -> tuple[Mapping[str, Any], ...]:
    """Tools as templates take them.

    Raises:
        InvalidRequest: a name or a schema is not what it must be, or there are too many.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest("tools", f"`tools` has {len(tools)} entries; the most is {MAX_TOOLS}")
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
        given = tool.parameters or '{"type": "object", "properties": {}}'
        function["parameters"] = _json_object(f"tools[{number}].parameters", given)
        read[tool.name] = {"type": "function", "function": function}
    return tuple(read.values())


def read_offer(request: pb.ChatRequest) -> ToolOffer | None:
    """What a conversation offers; None when that is nothing."""
    tools, choice, name = read_tools(request.tools), request.tool_choice, request.tool_name
    if choice not in (pb.TOOL_CHOICE_UNSPECIFIED, pb.TOOL_CHOICE_NONE, pb.TOOL_CHOICE_REQUIRED):
        raise InvalidRequest("tool_choice", f"`tool_choice`={choice} is none of ours")
    if name and choice != pb.TOOL_CHOICE_UNSPECIFIED:
        raise InvalidRequest("tool_name", "`tool_name` and `tool_choice` exclude each other")
    if not tools and (name or choice == pb.TOOL_CHOICE_REQUIRED):
        raise InvalidRequest("tool_choice", "a call is required and `tools` is empty; offer some")
    if not tools or choice == pb.TOOL_CHOICE_NONE:
        return None
    given = request.HasField("parallel_tool_calls")
    parallel = request.parallel_tool_calls if given else True
    grammar = None
    forced = [tool for tool in tools if not name or tool["function"]["name"] == name]
    if not forced:
        raise InvalidRequest("tool_name", f"`tool_name`={name[:128]!r} is not among `tools`")
    if name or choice == pb.TOOL_CHOICE_REQUIRED:
        most = 1 if name or not parallel else MAX_CALLS
        grammar = calls_grammar(forced, most=most)
    if request.sampling.HasField("grammar"):
        raise InvalidRequest(
            "grammar", "`grammar` leaves no room for calls; leave `tools` out, or choose none"
        )
    return ToolOffer(tools=tools, parallel=parallel, grammar=grammar)


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(name, f"`{name}` is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(name, f"`{name}` is a JSON {type(value).__name__}, not an object")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):  # what follows (marks, templates) goes down by recursion
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise InvalidRequest(name, f"`{name}` is nested deeper than {MAX_JSON_DEPTH}; make it flatter")


def check_tokens(name: str, tokens: Sequence[int], card: ModelCard) -> None:
    """Raise `InvalidRequest` unless every token id is the model's."""
    if tokens and max(tokens) >= card.vocab_size:
        position = next(i for i, token in enumerate(tokens) if token >= card.vocab_size)
        raise InvalidRequest(
            name,
            f"`{name}[{position}]`={tokens[position]} is no token of the model; ids run from 0 to "
            f"{card.vocab_size - 1}",
        )


def check_room(num_prompt: int, max_tokens: int | None, max_model_len: int) -> int:
    """Output tokens that the request may take.

    Raises:
        InvalidRequest: the prompt, or prompt and `max_tokens`, exceed the context.
    """
    if num_prompt < 1:
        raise InvalidRequest("prompt", "the prompt is empty; give at least one token")
    room = max_model_len - num_prompt
    if room < 1:
        raise InvalidRequest(
            "prompt",
            f"the prompt has {num_prompt} tokens and the context {max_model_len}, one of which the "
            f"output needs; shorten the prompt to {max_model_len - 1} or less",
        )
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise InvalidRequest(
            "max_tokens",
            f"`max_tokens`={max_tokens} exceeds {max_model_len} \u2212 {num_prompt} prompt tokens; "
            f"lower it to {room} or less",
        )
    return max_tokens


def engine_request(
    *, request_id: str, prompt: Sequence[int], params: SamplingParams, priority: int, room: int
) -> EngineRequest:
    """What the engine is asked. The id gets a tail, since callers may use theirs twice."""
    return EngineRequest(
        request_id=f"{request_id}/{secrets.token_hex(4)}",
        prompt=tuple(prompt),
        params=replace(params, max_tokens=room),
        priority=priority,
    )


def _default(message: pb.Options, name: str, default: bool) -> bool:
    given: bool = getattr(message, name)
    return given if message.HasField(name) else default  # type: ignore[arg-type]


def defaults_to_wire(defaults: Mapping[str, float]) -> pb.SamplingParams:
    """A checkpoint's generation defaults as the wire says them."""
    message = pb.SamplingParams()
    for name, value in defaults.items():
        setattr(message, name, max(int(value), 0) if name == "top_k" else float(value))
    return message
