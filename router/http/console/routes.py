"""The paths of the console: its static files, and the state of the cluster as JSON.

The files hold no secret and need no key. The state needs an admin token: a tenant's API key does
not count, and the operator decides. Knows paths and headers; knows nothing of tokens and of groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from starlette.responses import RedirectResponse, Response

from arriero.router.http.console import static_files
from arriero.shards.errors import NotFound, Overloaded, PermissionDenied

CLUSTER = f"{static_files.PREFIX}/cluster.json"
"""Path of the state of the cluster; no static file has this name."""
MOST_AT_ONCE = 4
"""Reads that a gateway passes on at the same time: callers are not known before the answer."""

ReadCluster = Callable[[str], Awaitable[str]]
"""Reads the state of the cluster for the holder of an admin token, given the value of
`authorization`. Gives JSON; raises `ArrieroError`."""


def add_console(app: FastAPI, read_cluster: ReadCluster | None) -> None:
    """Add the console's paths.

    Args:
        app: the application.
        read_cluster: reads the state of the cluster; None where a gateway belongs to no cluster.
    """
    reading = asyncio.Semaphore(MOST_AT_ONCE)

    @app.get(CLUSTER, include_in_schema=False)
    async def cluster(request: Request) -> Response:
        """Status, events, KV caches and the latest failure; needs an admin token."""
        if read_cluster is None:
            raise PermissionDenied("this gateway belongs to no deployment that Admin describes")
        if reading.locked():
            raise Overloaded(f"{MOST_AT_ONCE} reads of the cluster run already; try again", 1.0)
        async with reading:
            content = await read_cluster(request.headers.get("authorization", ""))
        headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
        return Response(content, media_type="application/json", headers=headers)

    @app.get(static_files.PREFIX, include_in_schema=False)
    @app.get(static_files.PREFIX + "/{name:path}", include_in_schema=False)
    async def file(request: Request) -> Response:
        """A file of the page."""
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        if request.scope.get("raw_path", b"").endswith(b"/"):
            return RedirectResponse("../" + path.rpartition("/")[2], 308)  # relative links work
        return _answer(request, path)


def _answer(request: Request, path: str) -> Response:
    file = static_files.read(path)
    if file is None:
        raise NotFound(f"the console has no file {path[:128]!r}", field="", code="unknown_url")
    headers = {**file.headers, "etag": file.etag}
    known = request.headers.get("if-none-match", "")
    if file.etag in (tag.strip() for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.zipped, headers={**headers, "content-encoding": "gzip"})
    return Response(file.content, headers=headers)
