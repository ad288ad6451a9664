"""The HTTP application: which path does what.

It can listen by itself (`HttpServer`) or be mounted by another ASGI server. Knows paths; what a
call does is `Inference`'s, and how its JSON looks is said in `bodies` and `shapes`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from arriero.router.http import errors, translate
from arriero.router.http import responses as shapes
from arriero.router.http.middleware import RequestMiddleware
from arriero.router.http.request_schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Sampling,
    TokenizeBody,
)
from arriero.router.http.stream import EventStream, begin, merged, while_here
from arriero.router.inference import Aside, Inference, Stream
from arriero.router.observability.metrics import CONTENT_TYPE
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.router.text.constraints import described
from arriero.shards.errors import ArrieroError, InvalidRequest

log = logging.getLogger(__name__)

STALLED_S = 60.0
"""A group that has work and finished no step for so long is not healthy."""
_EXPOSED = ("x-request-id", "retry-after", "x-schema-not-enforced")
"""Headers of answers that pages may read."""
_DONE = b"data: [DONE]\n\n"
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, server-sent events that end in `[DONE]`.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field at fault."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS: dict[int | str, str] = {
    400: "A field breaks its limit, or is not known.",
    401: "An API key is needed: `authorization: Bearer …`.",
    403: "The key's tenant may not do this.",
    404: "No such model.",
    413: "The body is too large.",
    429: "A queue is full, or a tenant's limit reached; `retry-after` says when to come back.",
    503: "No group can serve the model now.",
    "default": "A fault of ours; the message holds the request id under which it is logged.",
}

Shape = shapes.ChatShape | shapes.CompletionShape


def create_app(inference: Inference, *, max_body_bytes: int, cors: Sequence[str] = ()) -> FastAPI:
    """The application over `inference`.

    Args:
        inference: answers the calls.
        max_body_bytes: the largest body taken.
        cors: origins of the web pages that may call it from a browser; "*" for any.
    """
    app = FastAPI(
        title="arriero",
        version="1",
        description="Chat, completions and tokens, in the shapes of the OpenAI API.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a client that follows may lose the body; the edge takes both
        responses={
            status: {
                "description": words,
                "content": {"application/json": {"schema": _ERROR_SCHEMA}},
            }
            for status, words in _REFUSALS.items()
        },
    )
    errors.install(app)
    app.add_middleware(RequestMiddleware, max_body_bytes=max_body_bytes, door=inference.door)
    if cors:
        # Outside of the edge: a browser asks first without a key, and may read errors as well.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors,
            allow_methods=("*",),
            allow_headers=("*",),
            allow_credentials="*" not in cors,
            allow_private_network=True,
            expose_headers=_EXPOSED,
        )
    _add_generation(app, inference)
    _add_tokens(app, inference)
    _add_sight(app, inference)
    return app


def _add_generation(app: FastAPI, inference: Inference) -> None:
    @app.post("/v1/chat/completions", response_class=Response, responses=_EVENTS)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        call = translate.chat_request(body)
        text, views = await while_here(request, inference.find(call.model))
        shape = shapes.ChatShape(views[0].model, text.tokenizer)
        aside = Aside()
        streams = [await inference.chat(call, request.state.caller, aside)]
        return await _answer(request, body, shape, streams, aside)

    @app.post("/v1/completions", response_class=Response, responses=_EVENTS)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one prompt or several."""
        calls = translate.generate_requests(body)
        text, views = await while_here(request, inference.find(calls[0].model))
        echo = [call.text for call in calls] if body.echo else None
        shape = shapes.CompletionShape(
            views[0].model,
            text.tokenizer,
            n=body.n or 1,
            echo=echo,
            skip_special=body.skip_special_tokens is not False,
            prompt_only=body.prompt_only,
        )
        aside = Aside(num_calls=len(calls))
        streams = [await inference.generate(call, request.state.caller, aside) for call in calls]
        return await _answer(request, body, shape, streams, aside)


async def _answer(
    request: Request, body: Sampling, shape: Shape, streams: Sequence[Stream], aside: Aside
) -> Response:
    messages = merged(streams)
    headers = {}
    if aside.not_enforced:
        headers["x-schema-not-enforced"] = described(aside.not_enforced)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        first = await while_here(request, begin(messages, aside.accepted))
        events = _events(first, messages, shape, with_usage, request.state.request_id)
        return EventStream(events, first, messages, headers)
    whole = await while_here(request, _gathered(messages))
    counted = shapes.usage(*(one.usage for _, one in whole if one.HasField("usage")))
    return JSONResponse(shape.whole(whole, counted), headers=headers)


async def _gathered(
    messages: AsyncGenerator[tuple[int, Message]],
) -> list[tuple[int, pb.GenerateResponse]]:
    async with aclosing(messages):
        return [
            (number, one.to_wire() if isinstance(one, TextDelta) else one)
            async for number, one in messages
        ]


async def _events(
    first: asyncio.Task[tuple[int, Message]],
    messages: AsyncGenerator[tuple[int, Message]],
    shape: Shape,
    with_usage: bool,
    request_id: str,
) -> AsyncGenerator[bytes]:
    """The stream as events; an error that comes after the beginning is one of them."""
    parts: list[pb.Usage] = []
    try:
        async with aclosing(messages):
            number, message = await first
            while True:
                if not isinstance(message, TextDelta) and message.HasField("usage"):
                    parts.append(message.usage)
                events = shape.encoded(number, message)
                if events:
                    yield events
                number, message = await anext(messages)
    except StopAsyncIteration:
        pass
    except ArrieroError as error:
        yield shapes.event(errors.describe(error))
        return
    except Exception:
        log.exception("request %s failed", request_id)
        yield shapes.event(errors.internal(request_id))
        return
    if with_usage:
        yield shapes.event(shape.last(shapes.usage(*parts)))
    yield _DONE


def _add_tokens(app: FastAPI, inference: Inference) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a text or a conversation, exactly as a completion would see them."""
        answer = await inference.tokenize(translate.tokenize_request(body))
        tokens = list(answer.token_ids)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": answer.max_model_len}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """Text of token ids; bytes that are not UTF-8 appear as U+FFFD."""
        call = translate.detokenize_request(body.model, body.tokens, body.skip_special_tokens)
        answer = await inference.detokenize(call)
        return {"prompt": answer.text}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models that some connected group serves now."""
        return {"object": "list", "data": [shapes.model(one) for one in inference.models()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One of them."""
        if not model:
            raise InvalidRequest("model", "the path names no model")
        return shapes.model(inference.model(model))


def _add_sight(app: FastAPI, inference: Inference) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while every model sleeps, or has a group that idles or finished a step lately."""
        groups = {
            view.group_id: {
                "model": view.model,
                "running": view.load.num_running,
                "waiting": view.load.num_waiting,
                "stalled_s": round(view.load.stalled_s, 1),
            }
            for view in inference.groups.groups()
        }
        lively = {
            view.model for view in inference.groups.groups() if view.load.stalled_s < STALLED_S
        }
        there = {view.model for view in inference.groups.groups()}
        asleep = inference.may_sleep - there
        missing = sorted(inference.groups.models() - lively - asleep)
        healthy = bool(lively | asleep) and not missing
        return JSONResponse(
            {
                "status": "ok" if healthy else "unavailable",
                "models_without_a_lively_group": missing,
                "groups": groups,
            },
            200 if healthy else 503,
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(inference.metrics.export(), headers={"content-type": CONTENT_TYPE})
