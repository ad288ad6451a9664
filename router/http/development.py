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
from starlette.responses import JSONResponse, Response

from arriero.router.http.weight_bodies import FinishBody, InitBody, StartBody, UpdateBody
from arriero.shards.errors import CheckpointError, Overloaded, PermissionDenied, Unavailable

PATHS = frozenset(
    {
        "/pause",
        "/resume",
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/is_paused",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
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
    _add_trainer(app, run)


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
    async def update_weights(body: UpdateBody, request: Request, model: Model = "") -> Response:
        """Serve the weights of a path, or receive tensors of the trainer; needs an admin token."""
        name = body.model or model
        if body.update_info is not None:
            info = body.update_info.model_dump_json()
            await run(request, "announce", model=name, info=info)
            await run(request, "receive", model=name, info=info)
            return JSONResponse({"message": "Weights updated"})
        await run(request, "push", model=name, path=body.path)
        version = await _settled(request, run, name)
        return JSONResponse({"status": "updated", "version": version})


def _add_trainer(app: FastAPI, run: Run) -> None:
    """Weights that a trainer broadcasts."""

    @app.post("/init_weight_transfer_engine")
    async def init_weight_transfer_engine(
        body: InitBody, request: Request, model: Model = ""
    ) -> Response:
        """Join the broadcast group of a trainer; returns once every slice has joined."""
        await run(request, "join", model=model, info=body.init_info.model_dump_json())
        return JSONResponse({"message": "Weight transfer initialized"})

    @app.post("/start_weight_update")
    async def start_weight_update(
        request: Request, body: StartBody | None = None, model: Model = ""
    ) -> Response:
        """Begin an update; with `update_info` the tensors are compared with the model."""
        await run(request, "start", model=model)
        if body is not None and body.update_info is not None:
            info = body.update_info.model_dump_json()
            await run(request, "announce", model=model, info=info)
        return JSONResponse({"message": "Weight update started"})

    @app.post("/finish_weight_update")
    async def finish_weight_update(
        request: Request, body: FinishBody | None = None, model: Model = ""
    ) -> Response:
        """Serve the received weights; returns once every group serves them."""
        label = "" if body is None else str(body.weight_version or "")
        await run(request, "finish", model=model, weight_version=label)
        version = await _settled(request, run, model)
        return JSONResponse(
            {
                "message": "Weight update finished",
                "version": version,
                "weight_version": label,
            }
        )


async def _settled(request: Request, run: Run, name: str) -> int:
    """Wait until every group serves what was pushed last; gives the number of the push.

    Raises:
        CheckpointError: a group refuses the weights.
    """
    while True:
        state = await run(request, "status", model=name)
        (model,) = state["models"][:1] or [{"settled": True, "error": "", "version": 0}]
        if model["error"]:
            raise CheckpointError(model["error"])
        if model["settled"]:
            return int(model["version"])
        await asyncio.sleep(POLL_S)
