"""The paths of `/v1/batches`.

Knows paths and fields; the spool keeps the batches, and a worker runs them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from pydantic import Field

from arriero.router.batches.lines import URLS
from arriero.router.batches.record import BatchRecord, window_s
from arriero.router.batches.spool import Spool
from arriero.router.http.batches_api.files import add_files, page, tenant_of
from arriero.router.http.fields import Body
from arriero.router.tenants import model_scope
from arriero.shards.errors import InvalidRequest

Json = dict[str, Any]

MAX_PAGE = 100
_MAX_METADATA, _MAX_KEY, _MAX_VALUE = 16, 64, 512


class BatchBody(Body):
    """A batch to create."""

    others: ClassVar = {}
    input_file_id: str = Field(description="A file of requests, from `/v1/files`.")
    endpoint: str = Field(description="The path that each request of the file names.")
    completion_window: str = Field(
        description="Time after which requests that were not run end in an error, such as 24h."
    )
    metadata: dict[str, str] | None = Field(None, description="Up to 16 texts of the client.")


def add_batches(app: FastAPI, spool: Spool) -> None:
    """Add the paths of files and batches to `app`."""
    add_files(app, spool)

    @app.post("/v1/batches")
    async def create(body: BatchBody, request: Request) -> Json:
        """Run the requests of a file beside other traffic."""
        record = _new_batch(body, tenant_of(request))
        await asyncio.to_thread(spool.create_batch, record)
        return record.to_json()

    @app.get("/v1/batches")
    async def batches(request: Request, limit: int = 20, after: str | None = None) -> Json:
        """The tenant's batches, newest first."""
        records = await asyncio.to_thread(spool.batches, tenant_of(request), int(time.time()))
        return page([record.to_json() for record in records], limit, after, MAX_PAGE)

    @app.get("/v1/batches/{batch_id}")
    async def batch(batch_id: str, request: Request) -> Json:
        """The state of a batch."""
        tenant, now = tenant_of(request), int(time.time())
        record = await asyncio.to_thread(spool.batch, tenant, batch_id, now)
        return record.to_json()

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str, request: Request) -> Json:
        """End a batch; the requests that were run stay in the results."""
        tenant, now = tenant_of(request), int(time.time())
        record = await asyncio.to_thread(spool.cancel, tenant, batch_id, now)
        return record.to_json()


def _new_batch(body: BatchBody, tenant: str) -> BatchRecord:
    """The record of a new batch.

    Raises:
        InvalidRequest: a field breaks its limit.
    """
    if body.endpoint not in URLS:
        raise InvalidRequest(
            "endpoint", f"`endpoint`={body.endpoint[:64]!r} must be {' or '.join(URLS)}"
        )
    metadata = body.metadata or {}
    if len(metadata) > _MAX_METADATA:
        raise InvalidRequest(
            "metadata", f"`metadata` has {len(metadata)} entries; the limit is {_MAX_METADATA}"
        )
    for key, value in metadata.items():
        if len(key) > _MAX_KEY or len(value) > _MAX_VALUE:
            raise InvalidRequest(
                "metadata",
                f"`metadata[{key[:_MAX_KEY]}]` has {len(key)} and {len(value)} characters; the "
                f"limits are {_MAX_KEY} and {_MAX_VALUE}",
            )
    now = int(time.time())
    return BatchRecord(
        id=f"batch_{secrets.token_hex(12)}",
        tenant=tenant,
        models=model_scope.models(),
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + window_s(body.completion_window),
        metadata=body.metadata,
    )
