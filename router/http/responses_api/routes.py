"""The paths of the Responses API.

Knows paths and the life of a response; the translation and the JSON are in the modules beside.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from arriero.router.calls.request_notes import RequestNotes
from arriero.router.http import answers, errors, translate
from arriero.router.http.hosted_tools import check as check_hosted
from arriero.router.http.request_schemas import ChatBody
from arriero.router.http.responses_api.events import ResponseEvents
from arriero.router.http.responses_api.schemas import InputBody, ResponsesBody
from arriero.router.http.responses_api.store import ResponseStore, StoredResponse
from arriero.router.http.responses_api.translate import chat_body, input_items
from arriero.router.http.stream import EventStream, merged, start_stream, until_disconnect
from arriero.router.inference import Inference, Stream
from arriero.shards.errors import InvalidRequest, NotFound

Json = dict[str, Any]

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response; with `stream`, server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}
MAX_PAGE = 100


def add_responses(app: FastAPI, inference: Inference, store: ResponseStore) -> None:
    """Add the paths to `app`."""
    _add_creation(app, inference, store)
    _add_stored(app, store)


def _add_creation(app: FastAPI, inference: Inference, store: ResponseStore) -> None:
    @app.post("/v1/responses", response_class=Response, responses=_EVENTS)
    async def create(body: ResponsesBody, request: Request) -> Response:
        """Answer items of input, in the shape of the OpenAI API."""
        earlier = await _earlier(body, request, store)
        call = translate.chat_request(_chat_body(body, earlier, request))
        text, views = await until_disconnect(request, inference.find(call.model))
        notes = RequestNotes()
        vocabulary = text.tokenizer.vocabulary if body.with_logprobs else None
        encoder = ResponseEvents(views[0].name, body, vocabulary)
        streams = [await inference.chat(call, request.state.caller, notes)]
        if not body.store:
            return await answers.answer(request, encoder, streams, notes, stream=body.stream)
        stored = StoredResponse(_tenant(request), encoder.response, earlier, input_items(body))
        if body.stream or body.background:
            return await _run(request, body, store, stored, encoder, streams, notes)
        answer = await answers.answer(request, encoder, streams, notes, stream=False)
        await store.end(stored)
        return answer

    @app.post("/v1/responses/input_tokens")
    async def input_tokens(body: InputBody, request: Request) -> Json:
        """Number of prompt tokens of an input, exactly as in `/v1/responses`."""
        earlier = await _earlier(body, request, store)
        call = translate.conversation_request(_chat_body(body, earlier, request))
        counted = await until_disconnect(request, inference.tokenize(call))
        return {"object": "response.input_tokens", "input_tokens": len(counted.token_ids)}


def _add_stored(app: FastAPI, store: ResponseStore) -> None:
    @app.get("/v1/responses/{response_id}", response_class=Response, responses=_EVENTS)
    async def retrieve(
        response_id: str, request: Request, stream: bool = False, starting_after: int = -1
    ) -> Response:
        """A stored response; with `stream`, its events after a sequence number."""
        stored = await store.get(_tenant(request), response_id)
        if not stream:
            return JSONResponse(stored.response)
        if not stored.events and stored.ended:
            raise InvalidRequest(
                "stream", f"response {response_id[:128]!r} was not streamed; leave out `stream`"
            )
        return _events(stored, max(-1, starting_after) + 1, {})

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str, request: Request) -> Json:
        """Forget a stored response."""
        await store.delete(await store.get(_tenant(request), response_id))
        return {"id": response_id, "object": "response", "deleted": True}

    @app.get("/v1/responses/{response_id}/input_items")
    async def items(
        response_id: str,
        request: Request,
        limit: int = 20,
        order: str = "desc",
        after: str | None = None,
    ) -> Json:
        """The items of a stored response's input."""
        stored = await store.get(_tenant(request), response_id)
        return _page(stored, limit, order, after)

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str, request: Request) -> Json:
        """Cancel a response that runs in background."""
        stored = await store.get(_tenant(request), response_id)
        if not stored.response["background"]:
            raise InvalidRequest(
                "response_id",
                f"response {response_id[:128]!r} is not in background; close its connection",
            )
        task = stored.task
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return stored.response


def _tenant(request: Request) -> str:
    return str(request.state.caller.tenant.name)


async def _earlier(body: InputBody, request: Request, store: ResponseStore) -> list[Json]:
    """The items of the response before, and of all before that one."""
    previous = body.previous_response_id
    if previous is None:
        return []
    try:
        stored = await store.get(_tenant(request), previous)
    except NotFound as error:
        field = "previous_response_id"
        raise InvalidRequest(field, str(error), "previous_response_not_found") from None
    if not stored.ended or stored.response["status"] not in ("completed", "incomplete"):
        raise InvalidRequest(
            "previous_response_id",
            f"`previous_response_id`={previous[:128]!r} has status "
            f"{stored.response['status']!r}; wait until it is completed",
        )
    return stored.conversation


def _chat_body(body: InputBody, earlier: Sequence[Json], request: Request) -> ChatBody:
    """The chat body; errors of the request name the fields of `body` from now on."""
    check_hosted(request, body.tools, "function")
    state = request.scope["state"]
    state[errors.NAMING] = str
    chat, conversation = chat_body(body, earlier)
    state[errors.NAMING] = conversation.renamed
    return chat


async def _run(
    request: Request,
    body: ResponsesBody,
    store: ResponseStore,
    stored: StoredResponse,
    encoder: ResponseEvents,
    streams: Sequence[Stream],
    notes: RequestNotes,
) -> Response:
    """Run a response in a task of its own; answers with its events, or at once in background."""
    messages = merged(streams)
    first = await until_disconnect(request, start_stream(messages, notes.accepted))
    content = answers.events(first, messages, encoder, request.scope)

    async def run() -> None:
        try:
            async for events in content:
                stored.add(events)
        except asyncio.CancelledError:
            encoder.cancelled()
            raise
        finally:
            first.cancel()
            await content.aclose()
            await messages.aclose()
            await store.end(stored)

    stored.task = asyncio.create_task(run())
    store.begin(stored)
    if body.stream:
        return _events(stored, 0, answers.headers(notes))
    return JSONResponse(stored.response, headers=answers.headers(notes))


def _events(stored: StoredResponse, start: int, headers: dict[str, str]) -> Response:
    events = stored.follow(start)

    async def nothing() -> AsyncGenerator[bytes]:
        return
        yield b""

    async def first_event() -> None:
        while len(stored.events) <= start and not stored.ended:
            await stored.wait()

    first = asyncio.create_task(first_event())
    return EventStream(events, first, nothing(), headers)


def _page(stored: StoredResponse, limit: int, order: str, after: str | None) -> Json:
    """A page of a response's input items, each with an id."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest("limit", f"`limit`={limit} must be 1 to {MAX_PAGE}")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", f"`order`={order[:64]!r} must be asc or desc")
    ends = stored.response["id"].removeprefix("resp_")
    items = [{"id": f"item_{ends}_{n}", **item} for n, item in enumerate(stored.items)]
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after is not None:
        if after not in ids:
            raise InvalidRequest("after", f"`after`={after[:128]!r} is no item of the response")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }
