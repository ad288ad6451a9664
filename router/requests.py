"""Sampling parameters, options and limits of a request, read from its message and checked.

Knows the messages, the limits and a model's card; knows nothing of streams or groups.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

from google.protobuf.message import DecodeError, Message

from arriero.router.gateway_config import MAX_RESUMABLE_S
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.model_card import ModelCard
from arriero.router.text.stop_strings import check_stops
from arriero.router.text.text_model import TextModel
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import DraftKind
from arriero.shards.errors import ContextTooLong, InvalidRequest

M = TypeVar("M", bound=Message)

MAX_SALT_BYTES = 256
MAX_PREDICTION_BYTES = 256 * 1024
DRAFT_KINDS = get_args(DraftKind)
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
    """Stop strings and the contents of the answer; fields as in the message `Options`."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    include_text: bool = True
    include_token_ids: bool = True
    include_prompt_token_ids: bool = False
    resumable_s: int = 0
    cache_salt: str = ""
    speculation: str = ""
    prediction: str = ""


def parse(kind: type[M], raw: bytes) -> M:
    """Parse a message.

    Raises:
        InvalidRequest: the bytes are no such message, or hold a string that is not UTF-8.
    """
    message = kind()
    try:
        message.ParseFromString(raw)
    except DecodeError:
        raise InvalidRequest(
            "",
            f"the {len(raw)} bytes are no {kind.DESCRIPTOR.full_name}: malformed, or with a string "
            "that is not UTF-8",
        ) from None
    return message


def read_request_id(request_id: str) -> str:
    """The request id of the caller; a new id for an empty id."""
    if not request_id:
        return f"req-{secrets.token_hex(12)}"
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest(
            "request_id", "`request_id` must be 1 to 128 printable ASCII characters without spaces"
        )
    return request_id


def read_sampling(message: pb.SamplingParams, card: ModelCard) -> SamplingParams:
    """Checked sampling parameters, with a seed; `max_tokens` may still be None.

    Raises:
        InvalidRequest: a field breaks its limit.
    """
    fields: dict[str, Any] = {}
    for name, value in card.generation_defaults.items():
        fields[name] = int(value) if name == "top_k" else float(value)
    for name in _OPTIONAL:
        if message.HasField(name):  # type: ignore[arg-type]  # the stubs want a literal
            fields[name] = getattr(message, name)
    _read_synonyms(fields)
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


def _read_synonyms(fields: dict[str, Any]) -> None:
    """Replace values that other servers and clients use for "off" or "any" by our values."""
    for name, value in (("max_tokens", None), ("top_k", 0), ("seed", None)):
        if fields.get(name) == -1:
            fields[name] = value
    if fields.get("seed") is not None:
        fields["seed"] %= 2**63
    if fields.get("top_p") == 0:  # the smallest set of tokens is the likeliest token
        fields["top_p"], fields["top_k"] = 1.0, 1


def read_options(message: pb.Options) -> OutputOptions:
    """Checked output options.

    Raises:
        InvalidRequest: an option breaks its limit, or stop strings come without text.
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
        speculation=message.speculation,
        prediction=message.prediction,
    )
    _check_drafts(options)
    salt_bytes = len(options.cache_salt.encode())
    if salt_bytes > MAX_SALT_BYTES:
        raise InvalidRequest(
            "cache_salt",
            f"`cache_salt` has {salt_bytes} bytes; the limit is {MAX_SALT_BYTES}; shorten the salt",
        )
    if options.resumable_s > MAX_RESUMABLE_S:
        raise InvalidRequest(
            "resumable_s",
            f"`resumable_s`={options.resumable_s} must be at most {MAX_RESUMABLE_S}",
        )
    check_stops(options.stop)
    if options.stop and not options.include_text:
        raise InvalidRequest(
            "include_text", "`stop` needs text; set `include_text` or leave out `stop`"
        )
    return options


def _check_drafts(options: OutputOptions) -> None:
    if options.speculation not in ("", *DRAFT_KINDS):
        raise InvalidRequest(
            "speculation",
            f"`speculation`={options.speculation[:64]!r} is none of {', '.join(DRAFT_KINDS)}; the "
            "kind is the spec's, which a request can only narrow",
        )
    size = len(options.prediction.encode())
    if size > MAX_PREDICTION_BYTES:
        raise InvalidRequest(
            "prediction",
            f"`prediction` has {size} bytes; the limit is {MAX_PREDICTION_BYTES}; shorten it",
        )


async def read_prediction(options: OutputOptions, text: TextModel) -> tuple[int, ...]:
    """Tokens of the predicted output; none for a text that the tokenizer refuses."""
    if not options.prediction or options.speculation == "off":
        return ()
    try:
        tokens = await text.encode(options.prediction, add_special_tokens=False, trusted=False)
    except InvalidRequest:  # a prediction only makes a request faster
        return ()
    return tuple(tokens)


def read_resumed(
    message: pb.Resumed, sampling: pb.SamplingParams, params: SamplingParams, card: ModelCard
) -> tuple[str, dict[int, tuple[list[int], bool]]]:
    """The weights; and by sample, the tokens that the client has and whether the sample ended.

    Raises:
        InvalidRequest: a field breaks its limit.
    """
    if not sampling.HasField("seed") or sampling.seed == -1:
        raise InvalidRequest(
            "seed", "`resumed` needs `seed`; give the seed of the first message of the call"
        )
    samples: dict[int, tuple[list[int], bool]] = {}
    for number, sample in enumerate(message.samples):
        where = f"resumed.samples[{number}]"
        if sample.index >= params.n or sample.index in samples:
            raise InvalidRequest(
                "resumed", f"`{where}.index`={sample.index} must be unique and below `n`={params.n}"
            )
        check_tokens(f"{where}.token_ids", sample.token_ids, card)
        if params.max_tokens is not None and len(sample.token_ids) > params.max_tokens:
            raise InvalidRequest(
                "resumed",
                f"`{where}.token_ids` has {len(sample.token_ids)} entries; `max_tokens` is "
                f"{params.max_tokens}",
            )
        ended = sample.finished or len(sample.token_ids) == params.max_tokens
        samples[sample.index] = (list(sample.token_ids), ended)
    if len(samples) == params.n and all(ended for _, ended in samples.values()):
        raise InvalidRequest(
            "resumed", "every sample of `resumed` has ended; nothing is left to compute"
        )
    if any(tokens for tokens, _ in samples.values()) and not message.weights:
        raise InvalidRequest(
            "resumed", "`resumed.weights` is empty; give `weights` of the call's first message"
        )
    return message.weights, samples


def check_tokens(name: str, tokens: Sequence[int], card: ModelCard) -> None:
    """Raise `InvalidRequest` unless the model has every token id."""
    if tokens and max(tokens) >= card.vocab_size:
        position = next(i for i, token in enumerate(tokens) if token >= card.vocab_size)
        raise InvalidRequest(
            name,
            f"`{name}[{position}]`={tokens[position]} is no token of the model; give ids from 0 to "
            f"{card.vocab_size - 1}",
        )


def check_room(
    num_prompt: int, max_tokens: int | None, max_model_len: int, *, field: str = "prompt"
) -> int:
    """Most output tokens of a request.

    Args:
        num_prompt: number of prompt tokens.
        max_tokens: limit of the client; None for the room of the context.
        max_model_len: most tokens of prompt and output together.
        field: name of the prompt's field, for errors.

    Raises:
        ContextTooLong: the prompt, or prompt and `max_tokens`, exceed the context.
        InvalidRequest: the prompt is empty.
    """
    if num_prompt < 1:
        raise InvalidRequest(field, "the prompt is empty; give at least one token")
    room = max_model_len - num_prompt
    # The first words are from the OpenAI API: clients match these words, shorten and retry.
    context = f"This model's maximum context length is {max_model_len} tokens"
    if room < 1:
        raise ContextTooLong(
            field,
            f"{context}, and the output needs one; the prompt has {num_prompt} tokens. Please "
            f"reduce the length of the messages: shorten the prompt to {max_model_len - 1} or less",
        )
    if max_tokens is None:
        return room
    if max_tokens > room:
        raise ContextTooLong(
            "max_tokens",
            f"{context}; the request needs {num_prompt + max_tokens}: {num_prompt} prompt tokens "
            f"and `max_tokens`={max_tokens}. Please reduce the length of the messages, or lower "
            f"`max_tokens` to {room} or less",
        )
    return max_tokens


def fitted(
    params: SamplingParams, cards: Iterable[ModelCard], prompt: Sequence[int]
) -> SamplingParams:
    """Sampling parameters with `max_tokens` lowered to the room that the prompt leaves."""
    room = max(card.max_model_len for card in cards) - len(prompt)
    if params.max_tokens is None or params.max_tokens <= room:
        return params
    most = max(1, room)
    return replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))


def _default(message: pb.Options, name: str, default: bool) -> bool:
    value: bool = getattr(message, name)
    return value if message.HasField(name) else default  # type: ignore[arg-type]
