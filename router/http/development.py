"""vLLM's development paths: pause, sleep and weights of the groups behind the gateway.

Only a holder of an admin token may call them; an API key of a tenant does not count. The gateway
passes the token and the change on, and decides nothing. Knows bodies and queries; knows nothing of
tokens and of groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response

from arriero.shards.errors import CheckpointError, Overloaded, PermissionDenied, Unavailable

PATHS = frozenset(
    {
        "/pause",
        "/resume",
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/is_paused",
        "/update_weights",
        "/get_world_size",
        "/reset_prefix_cache",
    }
)
MOST_AT_ONCE = 4
"""Calls that a gateway passes on at the same time: callers are not known before the answer."""
POLL_S = 0.2

Json = dict[str, Any]
Develop = Callable[[str, str, Mapping[str, str | int]], Awaitable[Json]]
"""Changes or reads pauses and weights: value of `authorization`, action, fields. Gives the state;
raises `ArrieroError`."""
Run = Callable[..., Awaitable[Json]]
"""Passes a request on: the request, an action, and fields by name; gives the state."""
Model = Annotated[str, Query(max_length=256, description="The model; by default all.")]
Mode = Literal["keep", "wait", "abort"]


class UpdateBody(BaseModel):
    """New weights.

    Attributes:
        path: checkpoint folder, or a folder or file with some tensors, on every node.
        model: the model; may be left out where only one is served.
    """

    model_config = ConfigDict(extra="forbid")

    path: str
    model: str = ""


def add_development(app: FastAPI, develop: Develop | None) -> None:
    """Add the paths.

    Args:
        app: the application.
        develop: changes pauses and weights; None refuses all calls.
    """
    running = asyncio.Semaphore(MOST_AT_ONCE)

    async def run(request: Request, action: str, **fields: str | int) -> Json:
        if develop is None:
            raise PermissionDenied("this gateway belongs to no deployment that can be paused")
        if running.locked():
            raise Overloaded(f"{MOST_AT_ONCE} such calls run already; try again", 1.0)
        async with running:
            state = await develop(request.headers.get("authorization", ""), action, fields)
        if state.get("running") and action != "status":
            raise Unavailable(f"still under way, and goes on: {', '.join(state['running'])}")
        return state

    _add_holds(app, run)
    _add_weights(app, run)


def _add_holds(app: FastAPI, run: Run) -> None:
    """Pauses and sleep."""

    @app.post("/pause")
    async def pause(request: Request, model: Model = "", mode: Mode = "abort") -> Response:
        """Compute nothing until `/resume`; needs an admin token."""
        await run(request, "pause", model=model, mode=mode)
        return JSONResponse({"status": "paused"})

    @app.post("/resume")
    async def resume(request: Request, model: Model = "") -> Response:
        """End a pause; needs an admin token."""
        await run(request, "resume", model=model)
        return JSONResponse({"status": "resumed"})

    @app.post("/sleep")
    async def sleep(
        request: Request,
        model: Model = "",
        level: Annotated[int, Query(ge=0, le=2)] = 1,
        mode: Mode = "abort",
    ) -> Response:
        """Give the memory of weights and KV caches back; level 0 only pauses."""
        if level == 0:
            await run(request, "pause", model=model, mode=mode)
        else:
            await run(request, "sleep", model=model, mode=mode, level=level)
        return Response()

    @app.post("/wake_up")
    async def wake_up(request: Request, model: Model = "") -> Response:
        """Load the weights again, and end a pause; needs an admin token."""
        await run(request, "wake", model=model)
        await run(request, "resume", model=model)
        return Response()

    @app.get("/is_sleeping")
    async def is_sleeping(request: Request, model: Model = "") -> Response:
        """Whether all groups are asleep; needs an admin token."""
        state = await run(request, "status", model=model)
        return JSONResponse({"is_sleeping": state["asleep"]})

    @app.get("/is_paused")
    async def is_paused(request: Request, model: Model = "") -> Response:
        """Whether all groups are paused; needs an admin token."""
        state = await run(request, "status", model=model)
        return JSONResponse({"is_paused": state["paused"]})


def _add_weights(app: FastAPI, run: Run) -> None:
    """Weights, and what trainers ask beside them."""

    @app.get("/get_world_size")
    async def get_world_size(request: Request, model: Model = "") -> Response:
        """Slices of all groups; needs an admin token."""
        state = await run(request, "status", model=model)
        return JSONResponse({"world_size": state["num_slices"]})

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request, model: Model = "") -> Response:
        """Empty the prefix caches; needs an admin token."""
        await run(request, "flush", model=model)
        return Response()

    @app.post("/update_weights")
    async def update_weights(body: UpdateBody, request: Request) -> Response:
        """Serve other weights of the model; returns once every group serves them."""
        await run(request, "push", model=body.model, path=body.path)
        while True:
            state = await run(request, "status", model=body.model)
            (model,) = state["models"][:1] or [{"settled": True, "error": "", "version": 0}]
            if model["error"]:
                raise CheckpointError(model["error"])
            if model["settled"]:
                return JSONResponse({"status": "updated", "version": model["version"]})
            await asyncio.sleep(POLL_S)
