"""Which tokens of a request will be needed again, read from its message and checked.

Knows the message, its limits and the template of a conversation; knows nothing of blocks or groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from arriero.router.calls.conversation import ToolOffer
from arriero.router.calls.prompt import encode_conversation
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.text.model_card import ModelCard
from arriero.router.text.text_model import TextModel
from arriero.shards.errors import InvalidRequest
from arriero.shards.kv.retention import CacheHint, Retain

MAX_KEY_BYTES = 1024
MAX_RETAIN_S = 86_400
SESSION_S = 600
"""Seconds for which the blocks of a session stay, unless the request says otherwise."""
MAX_BREAKPOINTS = 4


@dataclass(frozen=True, slots=True)
class WantedRetention:
    """What a request wants to stay in the cache.

    Attributes:
        session: name of the session for engines; "" for none.
        retain_s: seconds for prompt and output; 0 for none.
        breakpoints: pairs of number of messages and seconds.
    """

    session: str
    retain_s: int
    breakpoints: tuple[tuple[int, int], ...] = ()


def session_name(key: str) -> str:
    """The name of a session for engines, from a client's key.

    Raises:
        InvalidRequest: the key is too long.
    """
    size = len(key.encode())
    if size > MAX_KEY_BYTES:
        raise InvalidRequest(
            "prompt_cache_key",
            f"`prompt_cache_key` has {size} bytes; the limit is {MAX_KEY_BYTES}; shorten the key",
        )
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest() if key else ""


def read_wanted(message: pb.CacheHint, key: str) -> WantedRetention | None:
    """The checked message; None if it wants nothing.

    Args:
        message: of the request.
        key: key of the session from the call's headers, if `message` has none.

    Raises:
        InvalidRequest: a field breaks its limit.
    """
    session = session_name(message.key or key)
    default_s = SESSION_S if session and not message.breakpoints else 0
    retain_s = message.retain_s if message.HasField("retain_s") else default_s
    if len(message.breakpoints) > MAX_BREAKPOINTS:
        raise InvalidRequest(
            "cache.breakpoints",
            f"`cache.breakpoints` has {len(message.breakpoints)} entries; the limit is "
            f"{MAX_BREAKPOINTS}; keep the last ones",
        )
    for seconds in (retain_s, *(point.retain_s for point in message.breakpoints)):
        if seconds > MAX_RETAIN_S:
            raise InvalidRequest(
                "cache.retain_s", f"`cache.retain_s`={seconds} must be at most {MAX_RETAIN_S}"
            )
    breakpoints = tuple((point.num_messages, point.retain_s) for point in message.breakpoints)
    if not (session or retain_s or breakpoints):
        return None
    return WantedRetention(session, retain_s, breakpoints)


def of_prompt(wanted: WantedRetention | None) -> CacheHint | None:
    """The hint for the engine, of a request without messages.

    Raises:
        InvalidRequest: there are breakpoints.
    """
    if wanted is None:
        return None
    if wanted.breakpoints:
        raise InvalidRequest(
            "cache.breakpoints", "`cache.breakpoints` count messages; give `cache.retain_s`"
        )
    whole = (Retain(seconds=wanted.retain_s),) if wanted.retain_s else ()
    return CacheHint(session=wanted.session, retain=whole)


async def of_conversation(
    wanted: WantedRetention | None,
    text: TextModel,
    request: pb.ChatRequest,
    offer: ToolOffer | None,
    prompt: Sequence[int],
) -> CacheHint | None:
    """The hint for the engine, of a conversation whose token ids are `prompt`.

    A breakpoint in the last message keeps the output as well, since the next request repeats it.
    """
    if wanted is None:
        return None
    points = list(wanted.breakpoints)
    if wanted.retain_s:
        points.append((len(request.messages), wanted.retain_s))
    retain: list[Retain] = []
    longest_s = 0
    for num_messages, seconds in sorted(points, reverse=True):
        if seconds <= longest_s:  # an end further back stays longer anyway
            continue
        longest_s = seconds
        if num_messages >= len(request.messages):
            retain.append(Retain(seconds=seconds))
            continue
        num_tokens = await _num_tokens(text, request, offer, prompt, num_messages)
        if num_tokens:
            retain.append(Retain(num_tokens=num_tokens, seconds=seconds))
    return CacheHint(session=wanted.session, retain=tuple(retain))


async def _num_tokens(
    text: TextModel,
    request: pb.ChatRequest,
    offer: ToolOffer | None,
    prompt: Sequence[int],
    num_messages: int,
) -> int:
    """Number of the prompt's tokens that come from the first messages."""
    messages = request.messages[:num_messages]
    if any(part.HasField("image") for message in messages for part in message.parts):
        return 0  # the images would be read twice; the whole prompt is in the cache anyway
    beginning = pb.ChatRequest(
        messages=messages,
        add_generation_prompt=False,
        documents=request.documents,
        template_variables=request.template_variables,
    )
    try:
        tokens, _ = await encode_conversation(text, beginning, offer)
    except InvalidRequest:  # the template does not take such a conversation
        return 0
    pairs = enumerate(zip(tokens, prompt, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(tokens), len(prompt)))


def num_writable(hint: CacheHint | None, card: ModelCard, num_prompt: int) -> int:
    """Prompt tokens of a request that the prefix cache can take: those of full blocks.

    With breakpoints alone, tokens up to the last breakpoint count.
    """
    if not card.cache_root:
        return 0
    if hint is not None and not hint.session and hint.retain:
        num_prompt = min(num_prompt, max(r.num_tokens or num_prompt for r in hint.retain))
    return num_prompt // card.block_size * card.block_size
