"""The states of a batch."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.router.batches import record as states
from arriero.router.batches.record import BatchRecord, RequestCounts
from arriero.shards.errors import InvalidRequest


def batch(**changes: Any) -> BatchRecord:  # noqa: ANN401
    values: dict[str, Any] = {
        "id": "batch_1",
        "tenant": "t",
        "endpoint": "/v1/completions",
        "input_file_id": "file-1",
        "completion_window": "24h",
        "created_at": 100,
        "expires_at": 200,
    }
    return BatchRecord(**(values | changes))


def finish(record: BatchRecord, completed: int, failed: int) -> BatchRecord:
    counts = RequestCounts(total=record.counts.total, completed=completed, failed=failed)
    return states.ended(record, output_file_id="file-o", error_file_id="", counts=counts, now=150)


def test_the_way_of_a_batch() -> None:
    record = batch()
    assert states.next_step(record) == "validate"
    record = states.checked(record, total=3, errors=(), now=110)
    assert (states.next_step(record), record.status) == ("run", "in_progress")
    assert states.on_time(record, cancelled_at=None, now=199) is record
    record = states.all_finished(record, 120)
    assert states.next_step(record) == "finalize"
    record = finish(record, 2, 1)
    assert (states.next_step(record), record.status, record.completed_at) == (
        "none",
        "completed",
        150,
    )
    assert states.on_time(record, cancelled_at=1, now=999) is record
    value = record.to_json()
    assert value["output_file_id"] == "file-o" and value["error_file_id"] is None
    assert value["request_counts"] == {"total": 3, "completed": 2, "failed": 1}


def test_time_and_clients_end_a_batch() -> None:
    running = states.checked(batch(), total=3, errors=(), now=110)
    late = states.on_time(running, cancelled_at=None, now=200)
    assert late.status == "finalizing" and finish(late, 2, 0).status == "expired"
    assert finish(late, 3, 0).status == "completed"  # the last answer came in time
    cancelled = states.on_time(running, cancelled_at=130, now=140)
    assert (cancelled.status, cancelled.cancelling_at) == ("cancelling", 130)
    assert finish(cancelled, 1, 0).status == "cancelled"
    unchecked = states.on_time(batch(), cancelled_at=None, now=200)
    assert finish(unchecked, 0, 0).status == "expired"


def test_faults_fail_a_batch_as_a_whole() -> None:
    faults = tuple({"code": "x", "line": number} for number in range(200))
    record = states.checked(batch(), total=200, errors=faults, now=110)
    assert record.status == "failed" and len(record.errors) == 100
    assert states.next_step(record) == "none"


@pytest.mark.parametrize(("text", "seconds"), [("24h", 86_400), ("5s", 5), ("30d", 2_592_000)])
def test_windows(text: str, seconds: int) -> None:
    assert states.window_s(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "0h", "31d", "1y", "-1h", "1h1m"])
def test_bad_windows(text: str) -> None:
    with pytest.raises(InvalidRequest, match="`completion_window`="):
        states.window_s(text)
