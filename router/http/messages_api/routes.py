"""The paths of the Messages API.

Knows paths; the translation and the JSON are in the modules beside.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from arriero.router.calls.request_notes import RequestNotes
from arriero.router.http import errors, translate
from arriero.router.http.answers import answer
from arriero.router.http.hosted_tools import check as check_hosted
from arriero.router.http.messages_api.events import MessageEvents
from arriero.router.http.messages_api.schemas import CountBody, MessagesBody
from arriero.router.http.messages_api.translate import chat_body
from arriero.router.http.request_schemas import ChatBody
from arriero.router.http.stream import until_disconnect
from arriero.router.inference import Inference

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The message; with `stream`, server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


def add_messages(app: FastAPI, inference: Inference) -> None:
    """Add the paths to `app`."""

    @app.post("/v1/messages", response_class=Response, responses=_EVENTS)
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Answer a conversation, in the shape of the Anthropic API."""
        chat = _chat_body(body, request)
        call = translate.chat_request(chat)
        _, views = await until_disconnect(request, inference.find(call.model))
        notes = RequestNotes()
        streams = [await inference.chat(call, request.state.caller, notes, fit_output=True)]
        hint = call.options.cache
        marked = bool(hint.breakpoints or hint.retain_s)
        encoder = MessageEvents(views[0].name, has_breakpoints=marked)
        return await answer(request, encoder, streams, notes, stream=body.stream)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountBody, request: Request) -> dict[str, int]:
        """Number of prompt tokens of a conversation, exactly as in `/v1/messages`."""
        chat = _chat_body(body, request)
        call = translate.conversation_request(chat)
        counted = await until_disconnect(request, inference.tokenize(call))
        return {"input_tokens": len(counted.token_ids)}


def _chat_body(body: CountBody, request: Request) -> ChatBody:
    """The chat body; errors of the request name the fields of `body` from now on."""
    check_hosted(request, body.tools, "custom")
    state = request.scope["state"]
    state[errors.NAMING] = str
    chat, conversation = chat_body(body)
    state[errors.NAMING] = conversation.renamed
    return chat
