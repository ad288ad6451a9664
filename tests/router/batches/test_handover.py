"""Batches that change hands: a stopped gateway, a lost owner, an owner that wakes again."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path

import pytest

from arriero.router.batches.batch_folder import BatchFolder, OwnedBatch
from arriero.router.batches.config import BatchesConfig
from arriero.router.batches.lines import BatchLine
from arriero.router.batches.record import BatchRecord
from arriero.router.batches.runner import LineAnswer
from arriero.router.batches.spool import Spool
from arriero.router.batches.worker import BatchWorker, LeaseWatch
from support.eventually import eventually_async

LINE = '{"custom_id":"r%d","method":"POST","url":"/v1/completions","body":{}}\n'


def new_batch(spool: Spool, folder: Path, count: int, batch_id: str = "1") -> BatchRecord:
    source = folder / "in.jsonl"
    source.write_text("".join(LINE % number for number in range(count)))
    now = int(time.time())
    with source.open("rb") as file:
        stored = spool.store("t", file, filename="in", purpose="batch", now=now, keep_s=3600)
    record = BatchRecord(
        id=f"batch_{batch_id:0>24}",
        tenant="t",
        endpoint="/v1/completions",
        input_file_id=stored.id,
        completion_window="1h",
        created_at=now,
        expires_at=now + 3600,
    )
    spool.create_batch(record)
    return record


class Execution:
    """Answers after a while, and counts the answers."""

    def __init__(self, wait_s: float = 0.01) -> None:
        self.wait_s = wait_s
        self.answered: Counter[str] = Counter()

    async def __call__(self, record: BatchRecord, line: BatchLine) -> LineAnswer:
        await asyncio.sleep(self.wait_s)
        self.answered[line.custom_id] += 1
        return LineAnswer(200, "req", {"text": line.custom_id})


async def completed(spool: Spool, record: BatchRecord) -> list[str]:
    """The names in the output of the batch, once it is complete."""
    async with asyncio.timeout(60):
        while (current := spool.batch("t", record.id, int(time.time()))).status != "completed":
            await asyncio.sleep(0.05)
    assert current.counts.completed == current.counts.total and not current.error_file_id
    text = spool.content("t", current.output_file_id).read_text()
    return sorted(json.loads(line)["custom_id"] for line in text.splitlines())


async def test_another_gateway_goes_on_after_a_stop(tmp_path: Path) -> None:
    spool = Spool(BatchesConfig(path=tmp_path / "spool", in_flight=4))
    record = new_batch(spool, tmp_path, 60)
    first, second = Execution(), Execution()
    worker = BatchWorker(spool, first)
    worker.start()
    async with asyncio.timeout(30):
        while len(first.answered) < 10:
            await asyncio.sleep(0.01)
    await worker.stop()
    num_first = len(first.answered)
    assert num_first < 60
    other = BatchWorker(Spool(spool.config), second)
    other.start()
    names = await completed(spool, record)
    await other.stop()
    assert names == sorted(f"r{number}" for number in range(60))
    assert len(second.answered) <= 60 - num_first + 4  # lines in flight are run once more


async def test_two_gateways_share_the_work_and_no_line_is_run_twice(tmp_path: Path) -> None:
    spool = Spool(BatchesConfig(path=tmp_path / "spool"))
    records = [new_batch(spool, tmp_path, 20, str(number)) for number in range(4)]
    executions = [Execution(0.001), Execution(0.001)]
    workers = [BatchWorker(Spool(spool.config), execution) for execution in executions]
    for worker in workers:
        worker.start()
    for record in records:
        assert len(await completed(spool, record)) == 20
    for worker in workers:
        await worker.stop()
    total = executions[0].answered + executions[1].answered
    assert set(total.values()) == {4}  # once for each batch


async def test_an_owner_that_wakes_again_changes_nothing(tmp_path: Path) -> None:
    spool = Spool(BatchesConfig(path=tmp_path / "spool", in_flight=4))
    record = new_batch(spool, tmp_path, 10)
    (opened,) = spool.open_batches()
    state = opened.folder.read()
    assert state is not None
    lost = opened.folder.claim(state, "lost")
    assert lost is not None and opened.folder.claim(state, "late") is None
    opened.folder.lines_path("output", lost.epoch).write_text(
        '{"custom_id":"r3","early":true}\n{"custom_id":"r4","torn'
    )
    execution = Execution()
    worker = BatchWorker(spool, execution, lease_s=0.3)
    worker.start()
    names = await completed(spool, record)
    await eventually_async(lambda: not spool.open_batches(), 30)
    await worker.stop()
    assert names == sorted(f"r{number}" for number in range(10))
    assert "r3" not in execution.answered and execution.answered["r4"] == 1
    assert not opened.folder.write(lost)  # the state of the old epoch counts no more
    assert spool.batch("t", record.id, 0).status == "completed"


async def test_a_line_of_two_epochs_counts_once(tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path)
    for epoch in (1, 2):
        line = f'{{"custom_id":"a","epoch":{epoch}}}\n'
        folder.lines_path("output", epoch).write_text('{"custom_id":"to\n' + line)
    assert [name for name, _ in folder.finished("output")] == ["a", "a"]


async def test_a_full_store_is_an_error_of_the_line(tmp_path: Path) -> None:
    config = BatchesConfig(path=tmp_path / "spool", in_flight=1, max_bytes=4000)
    spool = Spool(config)
    record = new_batch(spool, tmp_path, 30)
    worker = BatchWorker(spool, Execution(0))
    worker.start()
    async with asyncio.timeout(60):
        while not (current := spool.batch("t", record.id, int(time.time()))).has_ended:
            await asyncio.sleep(0.05)
    await worker.stop()
    assert current.status == "completed" and current.counts.failed > 0
    text = spool.content("t", current.error_file_id).read_text()
    assert {json.loads(line)["error"]["code"] for line in text.splitlines()} == {"storage_full"}


def test_what_is_old_goes(tmp_path: Path) -> None:
    spool = Spool(BatchesConfig(path=tmp_path / "spool"))
    new_batch(spool, tmp_path, 1)
    spool.remove_old(int(time.time()))
    assert len(spool.files("t")) == 1
    spool.remove_old(int(time.time()) + 4000)
    assert spool.files("t") == []


@pytest.mark.parametrize("clock_s", [0.0, 1e6])
def test_a_lease_ends_when_signs_of_life_stand_still(clock_s: float) -> None:
    watch = LeaseWatch(10.0)
    record = BatchRecord(
        id="b",
        tenant="t",
        endpoint="",
        input_file_id="",
        completion_window="1h",
        created_at=0,
        expires_at=1,
    )
    assert watch.may_claim("b", OwnedBatch(record=record), clock_s)
    for beat in range(20):
        lively = OwnedBatch(record=record, epoch=1, owner="x", beat=beat)
        assert not watch.may_claim("b", lively, clock_s + 5 * beat)
    assert not watch.may_claim("b", lively, clock_s + 5 * 19 + 9)
    assert watch.may_claim("b", lively, clock_s + 5 * 19 + 10)
