"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, in the shapes of vLLM.

Only a holder of an admin token may call the two paths; an API key of a tenant does not count. The
gateway passes the token and the change on, and decides nothing. Knows bodies; knows nothing of
tokens and of groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, StrictBool
from starlette.responses import PlainTextResponse, Response

from arriero.shards.errors import Overloaded, PermissionDenied

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATHS = frozenset({LOAD, UNLOAD})
MOST_AT_ONCE = 4
"""Changes that a gateway passes on at the same time: callers are not known before the answer."""

ChangeAdapter = Callable[[str, str, str, str, bool], Awaitable[str]]
"""Changes the adapters of the deployment: value of `authorization`, "add" or "remove", name, path,
and whether a name that serves is replaced. Gives a text for people; raises `ArrieroError`."""


class LoadBody(BaseModel):
    """An adapter to serve.

    Attributes:
        lora_name: model id for clients.
        lora_path: absolute path of the folder on every node.
        load_inplace: read the files again if the name serves already.
    """

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_path: str
    load_inplace: StrictBool = False


class UnloadBody(BaseModel):
    """An adapter to serve no more.

    Attributes:
        lora_name: its name.
        lora_int_id: accepted and not used, as in vLLM.
    """

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_int_id: int | None = None


def add_adapters(app: FastAPI, change: ChangeAdapter | None) -> None:
    """Add both paths.

    Args:
        app: the application.
        change: changes adapters; None refuses all calls.
    """
    running = asyncio.Semaphore(MOST_AT_ONCE)

    async def run(request: Request, action: str, name: str, path: str, replace: bool) -> Response:
        if change is None:
            raise PermissionDenied("this gateway belongs to no deployment that takes adapters")
        if running.locked():
            raise Overloaded(f"{MOST_AT_ONCE} changes of adapters run already; try again", 1.0)
        async with running:
            given = request.headers.get("authorization", "")
            return PlainTextResponse(await change(given, action, name, path, replace))

    @app.post(LOAD, response_class=PlainTextResponse)
    async def load(body: LoadBody, request: Request) -> Response:
        """Serve a LoRA adapter in every group of its model; needs an admin token."""
        return await run(request, "add", body.lora_name, body.lora_path, body.load_inplace)

    @app.post(UNLOAD, response_class=PlainTextResponse)
    async def unload(body: UnloadBody, request: Request) -> Response:
        """Accept no more requests for a LoRA adapter; needs an admin token."""
        return await run(request, "remove", body.lora_name, "", False)
