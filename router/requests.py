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

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.images import GivenImage, read_image
from arriero.router.text.model_card import ModelCard
from arriero.router.text.stop_strings import check_stops
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.errors import ContextTooLong, InvalidRequest

M = TypeVar("M", bound=Message)

MAX_TOOLS = 128
MAX_RESUMABLE_S = 600
MAX_DOCUMENTS = 128
MAX_SALT_BYTES = 256
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
    resumable_s: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolOffer:
    """The tools that a request offers, and how calls of them are taken.

    Attributes:
        tools: as templates take them.
        parallel: whether there may be several calls; else the first one ends the output.
        forced: those of which one must be called, in the form of `tools`; empty leaves it open.
        strict: those whose arguments must fit their schema, in the form of `tools`.
    """

    tools: tuple[Mapping[str, Any], ...]
    parallel: bool = True
    forced: tuple[Mapping[str, Any], ...] = ()
    strict: tuple[Mapping[str, Any], ...] = ()

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
        fields[name] = int(value) if name == "top_k" else float(value)
    for name in _OPTIONAL:
        if message.HasField(name):  # type: ignore[arg-type]  # the stubs want a literal
            fields[name] = getattr(message, name)
    _read_usual(fields)
    if message.HasField("allowed_token_ids"):
        fields["allowed_token_ids"] = tuple(message.allowed_token_ids.ids)
    params = SamplingParams(
        **fields,
        logit_bias=dict(message.logit_bias),
        banned_token_ids=tuple(message.banned_token_ids),
        stop_token_ids=tuple(message.stop_token_ids),
    )
    params.check(vocab_size=card.vocab_size)
    if card.turn_ends and not params.ignore_eos:
        stops = dict.fromkeys((*params.stop_token_ids, *card.turn_ends))
        params = replace(params, stop_token_ids=tuple(stops))
    if params.seed is None:
        params = replace(params, seed=secrets.randbits(63))
    return params


def _read_usual(fields: dict[str, Any]) -> None:
    """Values that mean "off" or "any" to the servers and clients in use, in our own words."""
    for name, own in (("max_tokens", None), ("top_k", 0), ("seed", None)):
        if fields.get(name) == -1:
            fields[name] = own
    if fields.get("seed") is not None:
        fields["seed"] %= 2**63
    if fields.get("top_p") == 0:  # the smallest set of tokens is the likeliest one
        fields["top_p"], fields["top_k"] = 1.0, 1


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
        resumable_s=message.resumable_s,
        cache_salt=message.cache_salt,
    )
    salt_bytes = len(options.cache_salt.encode())
    if salt_bytes > MAX_SALT_BYTES:
        raise InvalidRequest(
            "cache_salt",
            f"`cache_salt` has {salt_bytes} bytes; the most is {MAX_SALT_BYTES}; make it shorter",
        )
    if options.resumable_s > MAX_RESUMABLE_S:
        raise InvalidRequest(
            "resumable_s",
            f"`resumable_s`={options.resumable_s} must be at most {MAX_RESUMABLE_S}",
        )
    check_stops(options.stop)
    if options.stop and not options.include_text:
        raise InvalidRequest(
            "include_text", "`stop` needs text; leave `include_text` on or `stop` out"
        )
    return options


def read_resumed(
    message: pb.Resumed, given: pb.SamplingParams, params: SamplingParams, card: ModelCard
) -> tuple[str, dict[int, tuple[list[int], bool]]]:
    """The weights, and by sample the tokens that the client has and whether it has ended.

    Raises:
        InvalidRequest: a field breaks its limit.
    """
    if not given.HasField("seed") or given.seed == -1:
        raise InvalidRequest(
            "seed", "`resumed` needs `seed`: the one that the first message of the call gave"
        )
    samples: dict[int, tuple[list[int], bool]] = {}
    for number, one in enumerate(message.samples):
        where = f"resumed.samples[{number}]"
        if one.index >= params.n or one.index in samples:
            raise InvalidRequest(
                "resumed", f"`{where}.index`={one.index} must be below `n`={params.n}, and once"
            )
        check_tokens(f"{where}.token_ids", one.token_ids, card)
        if params.max_tokens is not None and len(one.token_ids) > params.max_tokens:
            raise InvalidRequest(
                "resumed",
                f"`{where}.token_ids` has {len(one.token_ids)} entries; `max_tokens` is "
                f"{params.max_tokens}",
            )
        ended = one.finished or len(one.token_ids) == params.max_tokens
        samples[one.index] = (list(one.token_ids), ended)
    if len(samples) == params.n and all(ended for _, ended in samples.values()):
        raise InvalidRequest("resumed", "`resumed` holds every sample's end; nothing is left")
    if any(tokens for tokens, _ in samples.values()) and not message.weights:
        raise InvalidRequest(
            "resumed", "`resumed.weights` is empty; give that of the call's first message"
        )
    return message.weights, samples


def read_messages(
    messages: Sequence[pb.Message],
) -> tuple[list[dict[str, Any]], list[GivenImage]]:
    """A conversation as templates take it, and its images in order.

    Raises:
        InvalidRequest: a call's arguments are nested too deep, or an image is not given as it must.
    """
    read = []
    images: list[GivenImage] = []
    for number, message in enumerate(messages):
        content = _content(f"messages[{number}]", message, images)
        one: dict[str, Any] = {"role": message.role, "content": content}
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
                        "arguments": _arguments(f"{where}[{at}].arguments", call.arguments),
                    },
                }
                for at, call in enumerate(message.tool_calls)
            ]
        read.append(one)
    return read, images


def _arguments(name: str, text: str) -> dict[str, Any] | str:
    """A call's arguments, as templates take them.

    Tools without parameters are called with none at all by some clients and models. What a model
    wrote that is no JSON object is shown to it as it stands, so that it can mend its call.
    """
    if text.strip() in ("", "null"):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return _json_object(name, text) if isinstance(value, dict) else text


def _content(where: str, message: pb.Message, images: list[GivenImage]) -> str | list[Any]:
    """Text, or where there are images a list of parts; the images are added to `images`."""
    if not message.parts:
        return message.content
    if message.content:
        raise InvalidRequest(
            f"{where}.parts", f"`{where}` has `content` and `parts`; give one of them"
        )
    parts: list[dict[str, str]] = []
    found = len(images)
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
    if len(images) == found:
        return "".join(part["text"] for part in parts)
    return parts


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


def read_documents(documents: Sequence[pb.Document]) -> tuple[Mapping[str, str], ...]:
    """Documents as templates take them.

    Raises:
        InvalidRequest: there are too many.
    """
    if len(documents) > MAX_DOCUMENTS:
        raise InvalidRequest(
            "documents", f"`documents` has {len(documents)} entries; the most is {MAX_DOCUMENTS}"
        )
    return tuple({"title": one.title, "text": one.text} for one in documents)


def read_variables(text: str) -> dict[str, Any]:
    """More variables for a template.

    Raises:
        InvalidRequest: they are no JSON object.
    """
    return _json_object("template_variables", text) if text else {}


def read_offer(request: pb.ChatRequest) -> ToolOffer | None:
    """What a conversation offers; None when that is nothing."""
    tools = read_tools(request.tools)
    choice = request.tool_choice
    if choice not in pb.ToolChoice.values():
        raise InvalidRequest("tool_choice", f"`tool_choice`={choice} is none of ours")
    if request.tool_name and choice != pb.TOOL_CHOICE_NAMED:
        raise InvalidRequest("tool_name", "`tool_name` is for TOOL_CHOICE_NAMED; leave it out")
    if choice == pb.TOOL_CHOICE_NONE:
        return None
    must = choice in (pb.TOOL_CHOICE_REQUIRED, pb.TOOL_CHOICE_NAMED)
    if must and not tools:
        raise InvalidRequest("tool_choice", "`tool_choice` asks for a call; offer some `tools`")
    if not tools:
        return None
    given = request.HasField("parallel_tool_calls")
    parallel = request.parallel_tool_calls if given else True
    forced = tools if must else ()
    if choice == pb.TOOL_CHOICE_NAMED:
        parallel = False
        forced = tuple(tool for tool in tools if tool["function"]["name"] == request.tool_name)
        if not forced:
            raise InvalidRequest(
                "tool_choice",
                f"`tool_choice` names {request.tool_name[:128]!r}, which is not among `tools`",
            )
    strict = tuple(tool for tool, given in zip(tools, request.tools, strict=True) if given.strict)
    return ToolOffer(tools=tools, parallel=parallel, forced=forced, strict=strict)


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


def check_room(
    num_prompt: int, max_tokens: int | None, max_model_len: int, *, field: str = "prompt"
) -> int:
    """Output tokens that the request may take.

    Args:
        num_prompt: tokens of the prompt.
        max_tokens: most output tokens; None for as many as there is room for.
        max_model_len: most tokens of prompt and output together.
        field: what the client calls the prompt.

    Raises:
        ContextTooLong: the prompt, or prompt and `max_tokens`, exceed the context.
        InvalidRequest: the prompt is empty.
    """
    if num_prompt < 1:
        raise InvalidRequest(field, "the prompt is empty; give at least one token")
    room = max_model_len - num_prompt
    # The first words are those of the OpenAI API: clients look for them, shorten and ask again.
    context = f"This model's maximum context length is {max_model_len} tokens"
    if room < 1:
        raise ContextTooLong(
            field,
            f"{context}, one of which the output needs; the prompt has {num_prompt} tokens. Please "
            f"reduce the length of the messages: shorten the prompt to {max_model_len - 1} or less",
        )
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise ContextTooLong(
            "max_tokens",
            f"{context}; {num_prompt + max_tokens} are asked for: {num_prompt} prompt tokens and "
            f"`max_tokens`={max_tokens}. Please reduce the length of the messages, or lower "
            f"`max_tokens`: lower it to {room} or less",
        )
    return max_tokens


def _default(message: pb.Options, name: str, default: bool) -> bool:
    given: bool = getattr(message, name)
    return given if message.HasField(name) else default  # type: ignore[arg-type]


def defaults_to_wire(defaults: Mapping[str, float]) -> pb.SamplingParams:
    """A checkpoint's generation defaults as the wire says them."""
    message = pb.SamplingParams()
    for name, value in defaults.items():
        setattr(message, name, int(value) if name == "top_k" else float(value))
    return message
