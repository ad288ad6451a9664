"""Runs one batch that this gateway owns: check the lines, run the requests, write the results.

Each step can be cut off at any point and done again by another gateway. Knows lines, states and the
folder of the batch; knows nothing of HTTP and of how a request is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from arriero.router.batches import record as states
from arriero.router.batches.append_file import AppendFile
from arriero.router.batches.batch_folder import INPUT, BatchFolder, Kind, OwnedBatch
from arriero.router.batches.lines import (
    BatchLine,
    LineError,
    answer_line,
    duplicate,
    error_line,
    raw_lines,
    read_line,
)
from arriero.router.batches.record import BatchRecord
from arriero.router.batches.spool import FileRecord, Spool, result_id

log = logging.getLogger(__name__)

T = TypeVar("T")

BEAT_S = 1.0
"""Seconds between two signs of life of an owner."""
_READ_AHEAD = 64
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
_AGAIN = frozenset({429, 503})
"""Statuses of a request that found no room; it is run again."""
_ENDS = {
    "expired": ("batch_expired", "the batch's time was over before the request was run"),
    "cancelled": ("batch_cancelled", "the batch was cancelled before the request was run"),
}


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """The answer to a request: HTTP status, id for the logs, and the JSON of the body."""

    status: int
    request_id: str
    body: Any


Execute = Callable[[BatchRecord, BatchLine], Awaitable[LineAnswer]]
"""Runs a request of a batch as a background request of the batch's tenant."""


class BatchRunner:
    """One batch, owned by this gateway.

    Args:
        folder: of the batch.
        batch: the batch, just claimed.
        spool: where results go.
        execute: runs a request.
        max_line_bytes: most bytes of a line.
    """

    def __init__(
        self,
        folder: BatchFolder,
        batch: OwnedBatch,
        spool: Spool,
        execute: Execute,
        max_line_bytes: int,
    ) -> None:
        self._folder, self._batch, self._spool = folder, batch, spool
        self._execute, self._max_line_bytes = execute, max_line_bytes
        self._stopped, self._ending = asyncio.Event(), asyncio.Event()
        self._error: Exception | None = None
        self._counts = {"output": 0, "errors": 0}
        self._room = 0

    @property
    def record(self) -> BatchRecord:
        """The batch as this gateway knows it."""
        return self._batch.record

    async def run(self) -> bool:
        """Run the batch to its end; False when another gateway has taken the batch."""
        beating = asyncio.create_task(self._beat())
        try:
            while (step := states.next_step(self.record)) != "none":
                if self._stopped.is_set() and not await self._is_ours():
                    return False
                if step == "validate":
                    self._set(await asyncio.to_thread(self._checked))
                elif step == "run":
                    await self._run_lines()
                else:
                    record = await asyncio.to_thread(self._finalized)
                    self._ending.set()
                    await beating  # its last write must not come after the last state
                    self._set(record)
                if not await asyncio.to_thread(self._folder.write, self._batch):
                    return False
            await asyncio.to_thread(self._folder.clear)
            return True
        finally:
            self._ending.set()
            await asyncio.gather(beating, return_exceptions=True)

    def release(self) -> None:
        """Let another gateway claim the batch at once; may block."""
        self._folder.write(replace(self._batch, owner=""))

    def _set(self, record: BatchRecord) -> None:
        self._batch = replace(self._batch, record=record)

    async def _is_ours(self) -> bool:
        return await asyncio.to_thread(self._folder.write, self._batch)

    async def _beat(self) -> None:
        """Show that the owner lives; stop the requests at a cancel request or the end of time."""
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._ending.wait()
            record = self.record
            if record.status == "in_progress":
                num_done = self._counts
                record = states.counted(
                    record, completed=num_done["output"], failed=num_done["errors"]
                )
            if record.status in ("validating", "in_progress"):
                cancelled_at = await asyncio.to_thread(self._folder.cancelled_at)
                now = int(time.time())
                record = states.on_time(record, cancelled_at=cancelled_at, now=now)
            changed = record.status != self.record.status
            self._batch = replace(self._batch, record=record, beat=self._batch.beat + 1)
            if changed or not await asyncio.to_thread(self._folder.write, self._batch):
                self._stopped.set()

    def _checked(self) -> BatchRecord:
        """The batch after a look at each line."""
        errors: list[states.Json] = []
        first: dict[str, int] = {}
        total = 0
        config = self._spool.config
        for item in self._read(self.record.endpoint):
            total += 1
            if isinstance(item, BatchLine):
                line = first.setdefault(item.custom_id, item.number)
                item = duplicate(item, line) if line != item.number else item
            if isinstance(item, LineError):
                errors.append(item.to_json())
            if len(errors) >= states.MAX_SHOWN_ERRORS:
                break
        if not total:
            errors.append(_fault("empty_file", "the file has no requests"))
        if total > config.max_lines:
            text = f"the file has {total} requests; the limit is {config.max_lines}; send several"
            errors.insert(0, _fault("too_many_requests", text))
        now = int(time.time())
        return states.checked(self.record, total=total, errors=tuple(errors), now=now)

    def _read(self, url: str = "") -> Iterator[BatchLine | LineError]:
        with (self._folder.path / INPUT).open("rb") as file:
            for raw in raw_lines(file, self._max_line_bytes):
                try:
                    yield read_line(raw, max_bytes=self._max_line_bytes, url=url)
                except LineError as error:
                    yield error

    async def _run_lines(self) -> None:
        """Run the requests that no epoch has finished, until the end or until `_stopped`."""
        finished = await asyncio.to_thread(self._finished_ids)
        self._room = await asyncio.to_thread(self._spool.room, self.record.tenant)
        epoch = self._batch.epoch
        files = {kind: _opened(self._folder, kind, epoch) for kind in ("output", "errors")}
        free = asyncio.Semaphore(self._spool.config.in_flight)
        tasks: set[asyncio.Task[None]] = set()
        stopping = asyncio.create_task(self._stopped.wait())
        try:
            async with aclosing(_ahead(self._read())) as lines:
                async for line in lines:
                    if isinstance(line, LineError) or line.custom_id in finished:
                        continue
                    if not await _acquired(free, stopping):
                        return
                    task = asyncio.create_task(self._run_line(line, files, free))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            while tasks and not stopping.done():
                await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                self._set(states.all_finished(self.record, int(time.time())))
        finally:
            stopping.cancel()
            for task in tasks:
                task.cancel()
            try:
                await asyncio.gather(stopping, *tasks, return_exceptions=True)
            finally:  # a stop of the gateway may come during this wait
                for file in files.values():
                    file.close()
            if self._error is not None:
                raise self._error

    def _finished_ids(self) -> set[str]:
        kinds: tuple[Kind, ...] = ("output", "errors")
        finished: set[str] = set()
        for kind in kinds:
            names = {custom_id for custom_id, _ in self._folder.finished(kind)} - finished
            self._counts[kind] = len(names)
            finished |= names
        return finished

    async def _run_line(
        self, line: BatchLine, files: dict[str, AppendFile], free: asyncio.Semaphore
    ) -> None:
        try:
            written = sum(file.num_bytes for file in files.values())
            if written > self._room:
                text = "the tenant's `gateway.batches.max_bytes` is used up; delete some files"
                kind, data = "errors", error_line(line.custom_id, "storage_full", text)
            else:
                kind, data = await self._answered(line)
            await files[kind].append(data)
            self._counts[kind] += 1
        except Exception as error:  # such as a full disk; `_run_lines` raises the error
            log.exception("batch %s, line %d", self.record.id, line.number)
            self._error = error
            self._stopped.set()
        finally:
            free.release()

    async def _answered(self, line: BatchLine) -> tuple[str, bytes]:
        """The kind of a request's line, and the line; runs the request until it finds room."""
        pause_s = _FIRST_PAUSE_S
        while True:
            answer = await self._execute(self.record, line)
            if answer.status not in _AGAIN:
                data = answer_line(line.custom_id, answer.status, answer.request_id, answer.body)
                return ("output" if answer.status < 400 else "errors"), data
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _finalized(self) -> BatchRecord:
        """Write the results of all epochs, each request once, and end the batch."""
        seen: set[str] = set()
        now = int(time.time())
        output_id, completed = self._write_result("output", self._merged("output", seen), now)
        num_failed = itertools.count()
        failed = self._merged("errors", seen, num_failed)
        lines = itertools.chain(failed, self._unrun(seen))
        error_id, _ = self._write_result("errors", lines, now)
        counts = replace(self.record.counts, completed=completed, failed=next(num_failed))
        return states.ended(
            self.record, output_file_id=output_id, error_file_id=error_id, counts=counts, now=now
        )

    def _merged(
        self, kind: Kind, seen: set[str], num_lines: Iterator[int] | None = None
    ) -> Iterator[bytes]:
        """The finished lines of requests that are not in `seen`; adds them to `seen`."""
        for custom_id, line in self._folder.finished(kind):
            if custom_id not in seen:
                seen.add(custom_id)
                if num_lines is not None:
                    next(num_lines)
                yield line

    def _unrun(self, seen: set[str]) -> Iterator[bytes]:
        """Lines for the requests that were not run, because time or a client ended the batch."""
        if self.record.in_progress_at is None:
            return
        code, text = _ENDS["cancelled" if self.record.status == "cancelling" else "expired"]
        for item in self._read():
            if isinstance(item, BatchLine) and item.custom_id not in seen:
                yield error_line(item.custom_id, code, text)

    def _write_result(self, kind: Kind, lines: Iterator[bytes], now: int) -> tuple[str, int]:
        """Keep the lines as a file of the tenant; returns the file's id, "" for no lines."""
        record, num_lines = self.record, 0
        path = self._folder.path / f"result-{kind}.jsonl.new"
        with path.open("wb") as file:
            for line in lines:
                file.write(line)
                num_lines += 1
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if not num_lines:
            path.unlink()
            return "", 0
        result = FileRecord(
            id=result_id(record.id, kind),
            filename=f"{record.id}_{kind}.jsonl",
            purpose="batch_output",
            bytes=size,
            created_at=now,
            expires_at=now + int(self._spool.config.keep_s),
        )
        self._spool.adopt(record.tenant, path, result)
        return result.id, num_lines


async def _acquired(free: asyncio.Semaphore, stopping: asyncio.Task[Any]) -> bool:
    """Wait for a place; False when `stopping` ends first."""
    acquiring = asyncio.create_task(free.acquire())
    try:
        await asyncio.wait({acquiring, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not acquiring.done():
            acquiring.cancel()
    return not stopping.done()


async def _ahead(lines: Iterator[T]) -> AsyncGenerator[T]:
    """The items of an iterator that reads from the disk, without blocking the event loop."""
    while chunk := await asyncio.to_thread(lambda: list(itertools.islice(lines, _READ_AHEAD))):
        for item in chunk:
            yield item


def _opened(folder: BatchFolder, kind: Kind, epoch: int) -> AppendFile:
    return AppendFile(folder.lines_path(kind, epoch).open("ab"))


def _fault(code: str, text: str) -> states.Json:
    return {"code": code, "message": text, "param": "input_file_id", "line": None}
