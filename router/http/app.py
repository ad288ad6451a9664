"""The HTTP application: a handler for each path.

Listens by itself (`HttpServer`) or is mounted by another ASGI server. Knows paths; knows nothing of
the work of a call (`Inference`) or of the form of its JSON (`request_schemas`, `responses`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from arriero.router.batches.spool import Spool
from arriero.router.calls.request_notes import RequestNotes
from arriero.router.guards.guards import Guards
from arriero.router.http import cache_hints, errors, responses, translate
from arriero.router.http.answers import answer
from arriero.router.http.batches_api.routes import add_batches
from arriero.router.http.completion_calls import (
    CompletionCalls,
    begin,
    chat_calls,
    text_calls,
)
from arriero.router.http.console.routes import ReadCluster, add_console
from arriero.router.http.console.static_files import paths as console_paths
from arriero.router.http.development import Develop, add_development
from arriero.router.http.hosted_tools import HostedTools
from arriero.router.http.lora_adapters import ChangeAdapter, add_adapters
from arriero.router.http.messages_api.routes import add_messages
from arriero.router.http.middleware import RequestMiddleware, authorization
from arriero.router.http.moderations import add_moderations
from arriero.router.http.request_schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from arriero.router.http.responses_api.routes import add_responses
from arriero.router.http.responses_api.store import ResponseStore
from arriero.router.http.resumable_answers import ResumableAnswers
from arriero.router.inference import Inference
from arriero.router.observability.metrics import CONTENT_TYPE
from arriero.router.tenants import model_scope
from arriero.shards.errors import InvalidRequest

STALLED_S = 60.0
"""Seconds without a finished step after which a group with work counts as unhealthy."""
_EXPOSED = ("x-request-id", "retry-after", "x-schema-not-enforced", "x-resumable")
"""Headers of answers that web pages may read."""
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
    400: "A field breaks its limit or is unknown.",
    401: "An API key is needed: `authorization: Bearer …` or `x-api-key: …`.",
    403: "The key's tenant may not do this.",
    404: "No such model.",
    413: "The body is too large.",
    429: "A queue is full or a tenant's limit is reached; `retry-after` holds the seconds to wait.",
    503: "No group can serve the model now.",
    "default": "An internal error; the message holds the request id of the log entry.",
}


class Application(FastAPI):
    """FastAPI that makes its schema once in a process: all applications have the same routes."""

    _schema: ClassVar[dict[str, Any] | None] = None

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI schema."""
        if Application._schema is None:
            Application._schema = super().openapi()
        return Application._schema


def create_app(
    inference: Inference,
    response_store: ResponseStore,
    resumable: ResumableAnswers,
    *,
    max_body_bytes: int,
    cors: Sequence[str] = (),
    hosted_tools: HostedTools = "ignore",
    spool: Spool | None = None,
    change_adapter: ChangeAdapter | None = None,
    develop: Develop | None = None,
    guards: Guards | None = None,
    console: bool = False,
    read_cluster: ReadCluster | None = None,
) -> FastAPI:
    """The application over `inference`, with all that FastAPI would build at the first request.

    A build takes up to a second of computing. On the event loop of a gateway with linked groups,
    the heartbeats of the groups would wait for it.

    Args:
        inference: runs the calls.
        response_store: keeps the responses of `/v1/responses`.
        resumable: keeps the streams of completions that clients may resume.
        max_body_bytes: most bytes of a body.
        cors: origins of web pages that may call the application from a browser; "*" for any.
        hosted_tools: what happens to requests with tools that a server would run.
        spool: keeps files and batches; None leaves `/v1/files` and `/v1/batches` out.
        change_adapter: changes the adapters of the deployment; None refuses changes.
        develop: changes pauses and weights of the deployment; None refuses changes.
        guards: answers `/v1/moderations`; None for guards without a default.
        console: serve the page `/console`.
        read_cluster: reads the state of the cluster for the console; None refuses reads.
    """
    app = Application(
        title="arriero",
        version="1",
        description="Chat, completions, responses and tokens in the shapes of the OpenAI API, and "
        "messages in the shape of the Anthropic API.",
        docs_url=None,
        redoc_url=None,
        # a redirected client may lose the body; the middleware accepts both paths
        redirect_slashes=False,
        responses={
            status: {
                "description": description,
                "content": {"application/json": {"schema": _ERROR_SCHEMA}},
            }
            for status, description in _REFUSALS.items()
        },
    )
    app.state.hosted_tools = hosted_tools
    errors.install(app)
    app.add_middleware(
        RequestMiddleware,
        max_body_bytes=max_body_bytes,
        admission=inference.admission,
        max_upload_bytes=0 if spool is None else spool.config.max_file_bytes,
        open_paths=console_paths() if console else frozenset(),
    )
    if cors:
        # Outside of RequestMiddleware: a browser's preflight has no key, and pages may read errors.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors,
            allow_methods=("*",),
            allow_headers=("*",),
            allow_credentials="*" not in cors,
            allow_private_network=True,
            expose_headers=_EXPOSED,
        )
    _add_generation(app, inference, resumable)
    add_messages(app, inference)
    add_responses(app, inference, response_store)
    if spool is not None:
        add_batches(app, spool)
    add_moderations(app, guards or Guards(inference))
    cache_hints.add_release(app, inference)
    add_adapters(app, change_adapter)
    add_development(app, develop)
    _add_tokens(app, inference)
    _add_observability(app, inference)
    if console:
        add_console(app, read_cluster)
    app.middleware_stack = app.build_middleware_stack()
    app.openapi()
    return app


def create_local_app(
    inference: Inference,
    response_store: ResponseStore,
    resumable: ResumableAnswers,
    hosted_tools: HostedTools,
) -> FastAPI:
    """The paths that a request of a batch may name, without middleware; for calls in the process.

    Args:
        inference: runs the calls.
        response_store: keeps the responses of `/v1/responses`.
        resumable: keeps the streams of completions that clients may resume.
        hosted_tools: what happens to requests with tools that a server would run.
    """
    app = FastAPI(openapi_url=None)
    app.state.hosted_tools = hosted_tools
    errors.install(app)
    _add_generation(app, inference, resumable)
    add_responses(app, inference, response_store)
    return app


def _add_generation(app: FastAPI, inference: Inference, resumable: ResumableAnswers) -> None:
    @app.post("/v1/chat/completions", response_class=Response, responses=_EVENTS)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        if resumable.continues(request):
            return await resumable.resume(request)
        calls = await chat_calls(body, request, inference)
        if body.stream and resumable.wants(request):
            return await resumable.start(request, calls, chat=True)
        return await run(request, calls, stream=body.stream)

    @app.post("/v1/completions", response_class=Response, responses=_EVENTS)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one prompt or several."""
        if resumable.continues(request):
            return await resumable.resume(request)
        calls = await text_calls(body, request, inference)
        if body.stream and resumable.wants(request):
            return await resumable.start(request, calls, chat=False)
        return await run(request, calls, stream=body.stream)

    @app.get("/v1/chat/completions/{answer_id}", response_class=Response, responses=_EVENTS)
    @app.get("/v1/completions/{answer_id}", response_class=Response, responses=_EVENTS)
    async def resume(answer_id: str, request: Request) -> Response:
        """The rest of a resumable stream, after the event that `Last-Event-ID` names."""
        return await resumable.resume(request, answer_id)

    async def run(request: Request, calls: CompletionCalls, *, stream: bool) -> Response:
        notes = RequestNotes(num_calls=len(calls.calls))
        caller = request.state.caller
        streams = [await begin(inference, call, caller, notes) for call in calls.calls]
        return await answer(request, calls.encoder, streams, notes, stream=stream)


def _add_tokens(app: FastAPI, inference: Inference) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a text or a conversation, exactly as in a completion."""
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
        """The models that a connected group serves now."""
        return {"object": "list", "data": [responses.model(model) for model in inference.models()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """Facts about a model."""
        if not model:
            raise InvalidRequest("model", "the path names no model; give `/v1/models/ID`")
        return responses.model(inference.model(model))


def _add_observability(app: FastAPI, inference: Inference) -> None:
    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        """200 while every model may sleep or has a group without stalled work.

        Where API keys are needed, a caller without one learns the status alone.
        """
        groups: dict[str, dict[str, Any]] = {
            view.group_id: {
                "model": view.model,
                "running": view.load.num_running,
                "waiting": view.load.num_waiting,
                "stalled_s": round(view.load.stalled_s, 1),
            }
            for view in inference.groups.groups()
        }
        active = {
            view.model for view in inference.groups.groups() if view.load.stalled_s < STALLED_S
        }
        linked = {view.model for view in inference.groups.groups()}
        asleep = inference.may_sleep - linked
        missing = sorted(inference.groups.models() - active - asleep)
        healthy = bool(active | asleep) and not missing
        content: dict[str, Any] = {"status": "ok" if healthy else "unavailable"}
        if inference.admission.knows(authorization(request.scope)):
            allows = model_scope.allows
            content |= {
                "models_without_a_lively_group": list(filter(allows, missing)),
                "groups": {name: group for name, group in groups.items() if allows(group["model"])},
            }
        return JSONResponse(content, 200 if healthy else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(inference.metrics.export(), headers={"content-type": CONTENT_TYPE})
