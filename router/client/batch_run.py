"""A file of requests, run against gateways over HTTP: `arriero batch run`.

A bounded number of requests is in flight, as background requests of the gateway. A refusal for lack
of room is tried again, and so is a request whose gateway was lost, at the next gateway. Knows lines
and HTTP; knows nothing of the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from arriero.router.batches.lines import (
    BatchLine,
    LineError,
    answer_line,
    duplicate,
    error_line,
    fault_line,
    raw_lines,
    read_line,
)
from arriero.router.client.batch_files import OutputFiles
from arriero.router.client.retry import FIRST_WAIT_S, LONGEST_WAIT_S
from arriero.shards.errors import ArrieroError, PermissionDenied, Unauthenticated, Unavailable

_CONNECT_S = 10.0
_KEEPALIVE = (  # a gateway whose machine is lost is noticed within a minute
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
_AGAIN = frozenset({408, 429, 502, 503, 504})
"""Statuses after which a request is sent again."""

_MOST_BROKEN = 5
"""Attempts of a request whose answer has no JSON: from a server that ends, or from a proxy."""
_REFRESH_S = 2.0
"""Least seconds between two questions for the gateways."""

Show = Callable[[int, int], None]
"""Called with the number of finished lines and the number of lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRunConfig:
    """Settings of a run.

    Attributes:
        source: file of requests.
        output: file of answers.
        errors: file of errors.
        urls: gateways, such as http://127.0.0.1:8000; or a function that returns these, called
            again when a gateway was lost. The function may block, and may raise ArrieroError.
        api_key: sent with each request; None for none.
        ca: file of the gateways' certificate authority; None for the system's.
        in_flight: most requests at once.
        max_line_bytes: most bytes of a line.
        give_up_s: seconds without any answer after which the run ends.
    """

    source: Path
    output: Path
    errors: Path
    urls: Sequence[str] | Callable[[], Sequence[str]]
    api_key: str | None = None
    ca: Path | None = None
    in_flight: int = 64
    max_line_bytes: int = 32 * 1024 * 1024
    give_up_s: float = 300.0


@dataclass(slots=True)
class BatchTotals:
    """Numbers of a run.

    Attributes:
        total: lines of the file.
        resumed: lines that earlier runs had finished.
        answered: lines that this run answered.
        failed: lines that this run wrote to the file of errors.
        errors: lines in the file of errors, those of earlier runs included.
    """

    total: int = 0
    resumed: int = 0
    answered: int = 0
    failed: int = 0
    errors: int = 0


class BatchRun:
    """One run over a file of requests.

    Args:
        config: settings.
        show: shows the progress.
    """

    def __init__(self, config: BatchRunConfig, show: Show = lambda done, total: None) -> None:
        self._config, self._show = config, show
        self._totals = BatchTotals()
        self._urls: Iterator[str] = iter(())
        self._asked_s = -math.inf
        self._failing_since_s: float | None = None

    async def run(self) -> BatchTotals:
        """Run the lines that no earlier run has finished.

        Raises:
            Unavailable: no gateway answered for `give_up_s` seconds.
            Unauthenticated, PermissionDenied: the gateways refuse the API key.
            SpecError: another run writes the files, or a file holds other lines.
            OSError: a file cannot be opened.
        """
        config = self._config
        urls = config.urls if isinstance(config.urls, Sequence) else config.urls()
        self._urls = itertools.cycle(urls)
        with config.source.open("rb") as source:
            self._totals.total = sum(1 for _ in raw_lines(source, config.max_line_bytes))
        verify = True if config.ca is None else ssl.create_default_context(cafile=str(config.ca))
        key = {} if config.api_key is None else {"authorization": f"Bearer {config.api_key}"}
        limits = httpx.Limits(max_connections=config.in_flight)
        with OutputFiles(config.output, config.errors) as files:
            self._totals.errors = files.done.num_errors
            async with httpx.AsyncClient(
                headers=key | {"x-background": "1"},
                timeout=httpx.Timeout(None, connect=_CONNECT_S),
                transport=httpx.AsyncHTTPTransport(
                    verify=verify, limits=limits, socket_options=_KEEPALIVE
                ),
            ) as client:
                lines = self._lines(files)
                try:
                    async with asyncio.TaskGroup() as tasks:
                        for _ in range(min(config.in_flight, max(1, self._totals.total))):
                            tasks.create_task(self._work(client, files, lines))
                except ExceptionGroup as group:
                    raise group.exceptions[0] from None
        return self._totals

    def _lines(self, files: OutputFiles) -> Iterator[BatchLine | LineError]:
        """The lines that are left to do."""
        first: dict[str, int] = {}
        with self._config.source.open("rb") as source:
            for raw in raw_lines(source, self._config.max_line_bytes):
                item: BatchLine | LineError
                try:
                    item = line = read_line(raw, max_bytes=self._config.max_line_bytes)
                    if first.setdefault(line.custom_id, line.number) != line.number:
                        item = duplicate(line, first[line.custom_id])
                except LineError as error:
                    item = error
                if isinstance(item, LineError):
                    is_done = item.line in files.done.lines
                else:
                    is_done = item.custom_id in files.done.custom_ids
                if is_done:
                    self._totals.resumed += 1
                    self._show_progress()
                else:
                    yield item

    async def _work(
        self, client: httpx.AsyncClient, files: OutputFiles, lines: Iterator[BatchLine | LineError]
    ) -> None:
        for item in lines:
            error = fault_line(item) if isinstance(item, LineError) else None
            if isinstance(item, BatchLine):
                answer = await self._send(client, item)
                line, is_answer = _written(item, answer)
                if is_answer:
                    await files.answer(line)
                    self._totals.answered += 1
                else:
                    error = line
            if error is not None:
                await files.error(error)
                self._totals.failed += 1
                self._totals.errors += 1
            self._show_progress()

    async def _send(self, client: httpx.AsyncClient, line: BatchLine) -> httpx.Response:
        """The answer to a request; tries again while the gateways have no room."""
        body = json.dumps(line.body).encode()
        pause_s, num_broken = FIRST_WAIT_S, 0
        while True:
            url = next(self._urls).rstrip("/")
            wait_s = pause_s
            try:
                answer = await client.post(
                    f"{url}{line.url}", content=body, headers={"content-type": "application/json"}
                )
                num_broken += _is_broken(answer)
                tries_again = _is_broken(answer) and num_broken < _MOST_BROKEN
                if answer.status_code not in _AGAIN and not tries_again:
                    self._failing_since_s = None
                    _check_key(answer)
                    return answer
                reason = f"{url}: {answer.status_code} {answer.text[:200]}"
                wait_s = max(pause_s, _retry_after_s(answer))
            except httpx.TransportError as error:
                reason = f"{url}: {str(error) or type(error).__name__}"
                await self._refresh()
            self._check_patience(reason)
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_WAIT_S)

    async def _refresh(self) -> None:
        """Learn the gateways again: a new gateway may be at another address."""
        discover = self._config.urls
        if isinstance(discover, Sequence) or time.monotonic() - self._asked_s < _REFRESH_S:
            return
        self._asked_s = time.monotonic()
        with contextlib.suppress(ArrieroError):  # the head may be on its way as well
            self._urls = itertools.cycle(await asyncio.to_thread(discover))

    def _check_patience(self, reason: str) -> None:
        now_s = time.monotonic()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        if now_s - self._failing_since_s > self._config.give_up_s:
            raise Unavailable(
                f"no gateway answered for {self._config.give_up_s:g} s, the last: {reason}; the "
                "same command resumes the run"
            )

    def _show_progress(self) -> None:
        totals = self._totals
        self._show(totals.resumed + totals.answered + totals.failed, totals.total)


def _written(line: BatchLine, answer: httpx.Response) -> tuple[bytes, bool]:
    """The line for an answer, and whether the line belongs to the file of answers."""
    try:
        body = answer.json()
    except ValueError:
        words = f"the gateway answered {answer.status_code} without JSON"
        return error_line(line.custom_id, "invalid_answer", words), False
    request_id = answer.headers.get("x-request-id", "")
    return answer_line(line.custom_id, answer.status_code, request_id, body), answer.is_success


def _is_broken(answer: httpx.Response) -> bool:
    """Whether the answer is a server's failure in another form than a gateway's."""
    return answer.is_server_error and "json" not in answer.headers.get("content-type", "")


def _check_key(answer: httpx.Response) -> None:
    """Refuse to go on with a key that the gateways refuse."""
    if answer.status_code == 401:
        raise Unauthenticated(f"the gateway refuses the API key: {answer.text[:200]}")
    if answer.status_code == 403:
        raise PermissionDenied(f"the gateway refuses the API key: {answer.text[:200]}")


def _retry_after_s(answer: httpx.Response) -> float:
    """Seconds of the header `retry-after`; 0 without."""
    value = answer.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0
