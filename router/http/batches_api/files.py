"""The paths of `/v1/files`.

Knows paths and forms; the spool keeps the files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, Response

from arriero.router.batches.spool import Spool
from arriero.shards.errors import InvalidRequest

Json = dict[str, Any]
T = TypeVar("T")

PATH = "/v1/files"
MAX_FILES_PAGE = 10_000
_MIN_KEEP_S = 3600
_MAX_NAME = 255
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": _MIN_KEEP_S},
                    },
                }
            }
        },
    }
}


def add_files(app: FastAPI, spool: Spool) -> None:
    """Add the paths to `app`."""
    _add_upload(app, spool)
    _add_stored(app, spool)


def _add_upload(app: FastAPI, spool: Spool) -> None:
    @app.post(PATH, openapi_extra=_FORM)
    async def upload(request: Request) -> Json:
        """Keep a file of requests for `/v1/batches`."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise InvalidRequest(
                "content-type", "a file is sent as multipart/form-data with `file` and `purpose`"
            )
        async with request.form(max_files=1, max_fields=16) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                code = "missing_required_parameter"
                raise InvalidRequest("file", "`file` is needed: the file's bytes", code)
            purpose = form.get("purpose")
            if purpose != "batch":
                raise InvalidRequest("purpose", f'`purpose`={str(purpose)[:64]!r} must be "batch"')
            seconds = form.get("expires_after[seconds]")
            record = await asyncio.to_thread(
                spool.store,
                tenant_of(request),
                file.file,
                filename=(file.filename or "file.jsonl")[:_MAX_NAME],
                purpose="batch",
                now=int(time.time()),
                keep_s=_keep_s(seconds, spool.config.keep_s),
            )
        return record.to_json()


def _add_stored(app: FastAPI, spool: Spool) -> None:
    @app.get(PATH)
    async def files(
        request: Request,
        purpose: str | None = None,
        limit: int = MAX_FILES_PAGE,
        order: str = "desc",
        after: str | None = None,
    ) -> Json:
        """The tenant's files."""
        records = await asyncio.to_thread(spool.files, tenant_of(request))
        if order not in ("asc", "desc"):
            raise InvalidRequest("order", f'`order`={order[:64]!r} must be "asc" or "desc"')
        if order == "asc":
            records.reverse()
        values = [r.to_json() for r in records if purpose in (None, r.purpose)]
        return page(values, limit, after, MAX_FILES_PAGE)

    @app.get(PATH + "/{file_id}")
    async def file(file_id: str, request: Request) -> Json:
        """Facts about a file."""
        record = await asyncio.to_thread(spool.file, tenant_of(request), file_id)
        return record.to_json()

    @app.get(PATH + "/{file_id}/content", response_class=Response)
    async def content(file_id: str, request: Request) -> Response:
        """The bytes of a file."""
        path = await asyncio.to_thread(spool.content, tenant_of(request), file_id)
        return FileResponse(path, media_type="application/jsonl")

    @app.delete(PATH + "/{file_id}")
    async def delete(file_id: str, request: Request) -> Json:
        """Forget a file; a batch that runs keeps its input."""
        await asyncio.to_thread(spool.delete_file, tenant_of(request), file_id)
        return {"id": file_id, "object": "file", "deleted": True}


def tenant_of(request: Request) -> str:
    """Name of the caller's tenant."""
    return str(request.state.caller.tenant.name)


def page(values: Sequence[Json], limit: int, after: str | None, most: int) -> Json:
    """A page of a list in the form of the OpenAI API.

    Raises:
        InvalidRequest: the limit is out of range, or the list has no entry `after`.
    """
    if not 1 <= limit <= most:
        raise InvalidRequest("limit", f"`limit`={limit} must be 1 to {most}")
    start = 0
    if after is not None:
        ids = [value["id"] for value in values]
        if after not in ids:
            raise InvalidRequest("after", f"`after`={after[:64]!r} is none of the list's ids")
        start = ids.index(after) + 1
    data = list(values[start : start + limit])
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": start + limit < len(values),
    }


def _keep_s(seconds: object, longest_s: float) -> float:
    """Seconds for which a file is kept; `seconds` is the client's wish, None for the longest."""
    if seconds is None:
        return longest_s
    text = str(seconds)
    if not text.isdigit() or not _MIN_KEEP_S <= int(text) <= longest_s:
        raise InvalidRequest(
            "expires_after",
            f"`expires_after[seconds]`={text[:64]!r} must be {_MIN_KEEP_S} to {longest_s:.0f}",
        )
    return float(text)
