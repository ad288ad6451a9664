"""The cache hints of a body as those of a call, and the end of a session.

Knows the fields of bodies and of calls; knows nothing of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import FastAPI, Request

from arriero.router.http.cache_fields import EXPLICIT_TTL, seconds
from arriero.router.http.messages import ChatMessage
from arriero.router.http.request_schemas import ChatBody, Sampling
from arriero.router.inference import Inference
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.errors import InvalidRequest


def fill(hint: pb.CacheHint, body: Sampling) -> None:
    """Set the hint of a call.

    Raises:
        InvalidRequest: the key is no text.
    """
    options = body.prompt_cache_options
    try:
        hint.key = body.prompt_cache_key or ""
    except (ValueError, UnicodeEncodeError):
        field = "prompt_cache_key"
        raise InvalidRequest(field, f"`{field}` is not valid Unicode; send another") from None
    ttl = (options and options.ttl) or body.prompt_cache_retention
    retain_s = None if ttl is None else seconds(ttl)
    whole = body.cache_control
    if whole is not None:
        retain_s = max(retain_s or 0, seconds(whole.ttl) or 0)
    points = sorted(_breakpoints(body), reverse=True) if isinstance(body, ChatBody) else []
    if points and options is not None and options.mode == "explicit":
        retain_s = 0
    if retain_s is not None:
        hint.retain_s = retain_s
    longest_s = retain_s or 0
    for num_messages, retain in points:  # times within a day: few of them are longer than all later
        if retain > longest_s and len(hint.breakpoints) < 4:
            longest_s = retain
            hint.breakpoints.add(num_messages=num_messages, retain_s=retain)


def _breakpoints(body: ChatBody) -> Iterator[tuple[int, int]]:
    """Pairs of number of messages and seconds."""
    ttl = (body.prompt_cache_options and body.prompt_cache_options.ttl) or EXPLICIT_TTL
    explicit_s = seconds(ttl) or 0
    for number, message in enumerate(body.messages, 1):
        for control_s in _of_message(message, explicit_s):
            yield number, control_s
    for tool in body.own_tools:
        for control in (tool.cache_control, tool.function.cache_control):
            if control is not None:
                yield 1, seconds(control.ttl) or 0


def _of_message(message: ChatMessage, explicit_s: int) -> Iterator[int]:
    content = message.content
    parts = content if isinstance(content, list) else ()
    for place in (message, *parts):
        if place.cache_control is not None:
            yield seconds(place.cache_control.ttl) or 0
        if place.prompt_cache_breakpoint is not None:
            yield explicit_s


def add_release(app: FastAPI, inference: Inference) -> None:
    """Add the path that ends a session."""

    @app.delete("/v1/prompt_caches/{key:path}")
    async def release(key: str, request: Request) -> dict[str, object]:
        """End a session: its prompts stay in the cache no longer than others. Always succeeds."""
        inference.release_session(key, request.state.caller)
        return {"id": key, "object": "prompt_cache", "deleted": True}
