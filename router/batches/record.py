"""The states of a batch, sans-I/O: a record, and the functions that change it.

    validating ──▶ in_progress ──▶ finalizing ──▶ completed
        │               │               └───────▶ expired
        ▼               ▼ cancel
      failed        cancelling ─────────────────▶ cancelled

A cancel request moves every state that has not ended to `cancelling`. At `expires_at` a batch that
has not ended goes to `finalizing` and from there to `expired`. Knows times that are passed in;
knows nothing of files and requests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from arriero.shards.errors import InvalidRequest

Json = dict[str, Any]
Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
Step = Literal["validate", "run", "finalize", "none"]
"""The next work of the gateway that owns a batch."""

ENDED: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})
MAX_SHOWN_ERRORS = 100
"""Most faults of lines that a failed batch names."""
MAX_WINDOW_S = 30 * 86_400
_WINDOW = re.compile(r"(\d{1,7})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestCounts:
    """Numbers of requests: all, answered, and ended in an error."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRecord:
    """A batch, in the terms of the OpenAI API; times are seconds since 1970.

    Attributes:
        id: id of the batch.
        tenant: name of the tenant.
        models: models of the key that created the batch; empty for all.
        endpoint: path that each line names.
        input_file_id: file of requests.
        completion_window: time for the batch as the client wrote it.
        created_at, expires_at: first and last moment of the batch.
        metadata: texts of the client.
        status: the state.
        counts: numbers of requests.
        errors: faults of lines, of a failed batch.
        output_file_id, error_file_id: results of an ended batch; "" for no lines.
        in_progress_at, finalizing_at, completed_at, failed_at, expired_at, cancelling_at,
            cancelled_at: when the batch entered the state; None for never.
    """

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    models: tuple[str, ...] = ()
    metadata: Mapping[str, str] | None = None
    status: Status = "validating"
    counts: RequestCounts = field(default_factory=RequestCounts)
    errors: tuple[Json, ...] = ()
    output_file_id: str = ""
    error_file_id: str = ""
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in ENDED

    def to_json(self) -> Json:
        """The batch as in the OpenAI API."""
        times = {
            f"{name}_at": getattr(self, f"{name}_at")
            for name in (
                *("created", "in_progress", "expires", "finalizing", "completed", "failed"),
                *("expired", "cancelling", "cancelled"),
            )
        }
        counts = self.counts
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": list(self.errors)} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id or None,
            "error_file_id": self.error_file_id or None,
            **times,
            "request_counts": {
                "total": counts.total,
                "completed": counts.completed,
                "failed": counts.failed,
            },
            "metadata": None if self.metadata is None else dict(self.metadata),
        }


def window_s(text: str) -> int:
    """Seconds of a `completion_window`, such as "24h".

    Raises:
        InvalidRequest: the text is no time from 1 s to 30 days.
    """
    match = _WINDOW.fullmatch(text)
    seconds = 0 if match is None else int(match[1]) * _UNITS[match[2]]
    if not 0 < seconds <= MAX_WINDOW_S:
        raise InvalidRequest(
            "completion_window",
            f"`completion_window`={text[:64]!r} must be a number with s, m, h or d, from 1s to "
            f"{MAX_WINDOW_S // 86_400}d, such as 24h",
        )
    return seconds


def next_step(record: BatchRecord) -> Step:
    """The work that a batch needs next."""
    if record.status == "validating":
        return "validate"
    if record.status == "in_progress":
        return "run"
    return "none" if record.has_ended else "finalize"


def checked(record: BatchRecord, *, total: int, errors: tuple[Json, ...], now: int) -> BatchRecord:
    """The batch after the check of all its lines; any fault fails the batch as a whole."""
    if errors:
        return replace(record, status="failed", failed_at=now, errors=errors[:MAX_SHOWN_ERRORS])
    counts = RequestCounts(total=total)
    return replace(record, status="in_progress", in_progress_at=now, counts=counts)


def counted(record: BatchRecord, *, completed: int, failed: int) -> BatchRecord:
    """The batch with other numbers of finished requests."""
    counts = replace(record.counts, completed=completed, failed=failed)
    return replace(record, counts=counts)


def on_time(record: BatchRecord, *, cancelled_at: int | None, now: int) -> BatchRecord:
    """The batch at a moment: a cancel request or the end of its time changes the state.

    Args:
        record: the batch.
        cancelled_at: when a client asked to cancel; None for never.
        now: the time.
    """
    if record.has_ended or record.status == "cancelling":
        return record
    if cancelled_at is not None:
        return replace(record, status="cancelling", cancelling_at=cancelled_at)
    if record.status in ("validating", "in_progress") and now >= record.expires_at:
        return replace(record, status="finalizing", finalizing_at=now)
    return record


def all_finished(record: BatchRecord, now: int) -> BatchRecord:
    """The batch once each request has an answer or an error."""
    return replace(record, status="finalizing", finalizing_at=now)


def ended(
    record: BatchRecord, *, output_file_id: str, error_file_id: str, counts: RequestCounts, now: int
) -> BatchRecord:
    """The batch once its files are written.

    Args:
        record: a batch in `finalizing` or `cancelling`.
        output_file_id: file of answers; "" for none.
        error_file_id: file of errors; "" for none.
        counts: numbers of lines in the files; fewer than the total when time or a client ended the
            batch.
        now: the time.
    """
    files = {"output_file_id": output_file_id, "error_file_id": error_file_id, "counts": counts}
    if record.status == "cancelling":
        return replace(record, status="cancelled", cancelled_at=now, **files)  # type: ignore[arg-type]
    if counts.completed + counts.failed < counts.total or not record.in_progress_at:
        return replace(record, status="expired", expired_at=now, **files)  # type: ignore[arg-type]
    return replace(record, status="completed", completed_at=now, **files)  # type: ignore[arg-type]
