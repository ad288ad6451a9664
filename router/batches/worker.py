"""The work on batches at a gateway: claims open batches and runs them.

A batch belongs to one gateway at a time. A gateway whose sign of life stands still for `LEASE_S`
seconds, by the clock of the observer, has lost its batches: another gateway claims them and goes on
with the lines that are not finished. Knows the spool and the clock; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import dataclass
from functools import partial

from arriero.router.batches.batch_folder import OwnedBatch
from arriero.router.batches.lines import MAX_LINE_BYTES
from arriero.router.batches.runner import BatchRunner, Execute
from arriero.router.batches.spool import OpenBatch, Spool

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Seconds between two looks for batches."""
LEASE_S = 10.0
"""Seconds without a sign of life after which the owner of a batch counts as lost."""
MAX_OWNED = 8
"""Most batches that a gateway runs at once."""
_REMOVE_S = 600.0
"""Seconds between two removals of old files."""


@dataclass(slots=True)
class _Sign:
    epoch: int
    beat: int
    since_s: float


class LeaseWatch:
    """Which owners still live, by their signs of life; sans-I/O.

    Args:
        lease_s: seconds without a sign of life after which an owner counts as lost.
    """

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._signs: dict[str, _Sign] = {}

    def may_claim(self, name: str, batch: OwnedBatch, now_s: float) -> bool:
        """Whether a batch has no living owner.

        Args:
            name: name of the batch among all.
            batch: the batch as just read.
            now_s: monotonic time.
        """
        if not batch.owner:
            return True
        sign = self._signs.get(name)
        if sign is None or (sign.epoch, sign.beat) != (batch.epoch, batch.beat):
            self._signs[name] = _Sign(batch.epoch, batch.beat, now_s)
            return False
        return now_s - sign.since_s >= self._lease_s

    def keep(self, names: set[str]) -> None:
        """Forget all other batches."""
        self._signs = {name: sign for name, sign in self._signs.items() if name in names}


class BatchWorker:
    """Runs the batches of a spool; `start` and `stop`.

    Args:
        spool: files and batches.
        execute: runs a request.
        max_line_bytes: most bytes of a line.
        lease_s: see `LeaseWatch`.
    """

    def __init__(
        self,
        spool: Spool,
        execute: Execute,
        *,
        max_line_bytes: int = MAX_LINE_BYTES,
        lease_s: float = LEASE_S,
    ) -> None:
        self._spool, self._execute = spool, execute
        self._max_line_bytes = max_line_bytes
        self._id = secrets.token_hex(8)
        self._watch = LeaseWatch(lease_s)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to look for batches."""
        self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        """Stop all work; other gateways may claim the batches at once."""
        tasks = [*self._running.values(), *([] if self._looking is None else [self._looking])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        removed_s = time.monotonic()
        while True:
            try:
                await self._claim_some()
                if time.monotonic() - removed_s > _REMOVE_S:
                    removed_s = time.monotonic()
                    await asyncio.to_thread(self._spool.remove_old, int(time.time()))
            except Exception:  # such as a folder that is away for a while
                log.exception("the batches in %s cannot be read", self._spool.config.path)
            await asyncio.sleep(POLL_S)

    async def _claim_some(self) -> None:
        batches = await asyncio.to_thread(self._claimable)
        for batch, state in batches[: MAX_OWNED - len(self._running)]:
            claimed = await asyncio.to_thread(batch.folder.claim, state, self._id)
            if claimed is not None:
                task = asyncio.create_task(self._run(batch, claimed))
                self._running[batch.name] = task
                task.add_done_callback(partial(self._forget, batch.name))

    def _forget(self, name: str, task: asyncio.Task[None]) -> None:
        self._running.pop(name, None)

    def _claimable(self) -> list[tuple[OpenBatch, OwnedBatch]]:
        """The batches without a living owner, oldest first."""
        now_s = time.monotonic()
        batches = []
        opened = self._spool.open_batches()
        self._watch.keep({batch.name for batch in opened})
        for batch in opened:
            if batch.name in self._running:
                continue
            state = batch.folder.read()
            if state is None:
                self._spool.forget_abandoned(batch)
            elif state.record.has_ended:
                self._spool.close_batch(batch)
            elif self._watch.may_claim(batch.name, state, now_s):
                batches.append((batch, state))
        batches.sort(key=lambda entry: (entry[1].record.created_at, entry[1].record.id))
        return batches

    async def _run(self, batch: OpenBatch, claimed: OwnedBatch) -> None:
        log.info("batch %s: epoch %d", claimed.record.id, claimed.epoch)
        runner = BatchRunner(
            batch.folder, claimed, self._spool, self._execute, self._max_line_bytes
        )
        try:
            if await runner.run():
                await asyncio.to_thread(self._spool.close_batch, batch)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                runner.release()
            raise
        except Exception:  # the lease ends, and a gateway tries again
            log.exception("batch %s stopped", claimed.record.id)
