"""Batches and data sets while commands, gateways and groups are killed: each answer exactly once.

Each way runs on the same deployment: `arriero batch run`, `/v1/batches`, Ray Data.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from arriero.cluster.connection import connected
from support.eventually import eventually
from support.tiny_deployment import TinyDeployment, tiny_deployment

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
LIMIT_S = 900.0
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3 * LIMIT_S),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyDeployment]:
    folder = tmp_path_factory.mktemp("batch")
    batches = {"batches": {"path": str(folder / "spool")}}
    with tiny_deployment(folder, Path(MODEL), gateway=batches) as deployment:
        yield deployment


def lines(count: int, max_tokens: int = 16) -> bytes:
    """Requests of different lengths, each with a name of its own."""
    rng = random.Random(1)
    requests = (
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "tiny",
                "messages": [{"role": "user", "content": f"Name {number} things."}],
                "max_tokens": rng.randint(1, max_tokens),
            },
        }
        for number in range(count)
    )
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def names(data: bytes) -> Counter[str]:
    """How often each name is in a file of results; a torn last line does not count."""
    whole = data[: data.rfind(b"\n") + 1]
    return Counter(json.loads(line)["custom_id"] for line in whole.splitlines())


def expected(count: int) -> dict[str, int]:
    return {f"r{number}": 1 for number in range(count)}


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_command_a_gateway_and_a_group_are_killed(
    deployed: TinyDeployment, tmp_path: Path
) -> None:
    count, rng = 1000, random.Random(4)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines(count))
    command = [sys.executable, "-m", "arriero.cluster.cli", "batch", "run", source, output]
    environment = os.environ | {"ARRIERO_STATE": str(deployed.folder), "OMP_NUM_THREADS": "1"}
    environment |= deployed.environment
    log = (tmp_path / "log").open("wb")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def stop(sign: signal.Signals) -> Callable[[], None]:
        def restart() -> None:
            nonlocal running
            running.send_signal(sign)
            running.wait(120)
            running = start()

        return restart

    faults: list[Callable[[], None]] = [
        stop(signal.SIGKILL),
        stop(signal.SIGINT),
        lambda: deployed.kill_gateway(rng),
        lambda: deployed.kill_group(rng),
    ]
    rng.shuffle(faults)
    moments = sorted(rng.sample(range(50, 800), len(faults)))
    running = start()
    try:
        for moment, fault in zip(moments, faults, strict=True):
            eventually(
                lambda moment=moment: num_lines(output) >= moment,  # type: ignore[misc]
                LIMIT_S,
                every_s=0.02,
                state=(tmp_path / "log").read_text,
            )
            print(f"{num_lines(output)} lines", flush=True)
            fault()
        code = running.wait(LIMIT_S)
    finally:
        running.kill()
        running.wait()
        log.close()
    text = (tmp_path / "log").read_text()
    assert code == 0, text
    assert names(output.read_bytes()) == expected(count)
    assert num_lines(tmp_path / "out.errors.jsonl") == 0
    assert sorted(deployed.kills) == ["gateway", "group"], "each fault came before the end"
    assert "1000 lines: " in text.splitlines()[-1]
    deployed.wait_whole()


class Clients:
    """OpenAI's client against the gateways that are there, one after the other."""

    def __init__(self, deployed: TinyDeployment) -> None:
        self._deployed = deployed

    def __call__(self, call: Callable[[openai.OpenAI], Any]) -> Any:  # noqa: ANN401
        """The answer to a call; a lost gateway costs another try."""
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            for url in self._deployed.urls():
                try:
                    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                        return call(client)
                except openai.APIConnectionError:
                    assert time.monotonic() < deadline_s
            time.sleep(0.2)

    def wait(self, batch_id: str, until: Callable[[Any], bool]) -> Any:  # noqa: ANN401
        """The batch, once a condition holds or the batch has ended."""
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            batch = self(lambda client: client.batches.retrieve(batch_id))
            if until(batch) or batch.status in ENDED:
                return batch
            assert time.monotonic() < deadline_s, batch
            time.sleep(0.1)

    def begin(self, data: bytes) -> Any:  # noqa: ANN401
        file = self(lambda client: client.files.create(file=("in.jsonl", data), purpose="batch"))
        return self(
            lambda client: client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        )

    def results(self, file_id: str) -> bytes:
        content = self(lambda client: client.files.content(file_id).content)
        return bytes(content)


def test_gateways_and_groups_are_killed_under_a_batch(deployed: TinyDeployment) -> None:
    deployed.wait_whole()
    count, rng, ask = 400, random.Random(9), Clients(deployed)
    refused = json.loads(lines(1)) | {"custom_id": "refused"}
    refused["body"]["temperature"] = -3
    batch = ask.begin(lines(count) + json.dumps(refused).encode())
    faults = [deployed.kill_gateway, deployed.kill_group, deployed.kill_gateway]
    for number, fault in enumerate(faults, 1):
        ask.wait(batch.id, lambda now, least=80 * number: now.request_counts.completed >= least)  # type: ignore[misc]
        fault(rng)
        if fault == deployed.kill_gateway:
            deployed.wait_whole()
    batch = ask.wait(batch.id, lambda now: False)
    assert batch.status == "completed", batch
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (count + 1, count, 1)
    assert names(ask.results(batch.output_file_id)) == expected(count)
    (error,) = ask.results(batch.error_file_id).splitlines()
    assert json.loads(error)["custom_id"] == "refused"
    assert json.loads(error)["response"]["body"]["error"]["param"] == "temperature"


def test_a_cancelled_batch_has_each_name_once(deployed: TinyDeployment) -> None:
    deployed.wait_whole()
    count, ask = 200, Clients(deployed)
    batch = ask.begin(lines(count, max_tokens=400))
    ask.wait(batch.id, lambda now: now.request_counts.completed >= 20)
    ask(lambda client: client.batches.cancel(batch.id))
    batch = ask.wait(batch.id, lambda now: False)
    assert batch.status == "cancelled", batch
    answers = ask.results(batch.output_file_id)
    unrun = ask.results(batch.error_file_id)
    assert names(answers) + names(unrun) == expected(count)
    codes = {json.loads(line)["error"]["code"] for line in unrun.splitlines()}
    assert codes == {"batch_cancelled"}
    assert all(json.loads(line)["response"]["status_code"] == 200 for line in answers.splitlines())


@pytest.mark.filterwarnings("ignore")
def test_rows_while_a_group_and_a_gateway_are_killed(
    deployed: TinyDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("pandas", "pyarrow"):
        pytest.importorskip(package, reason="needs the extra arriero[data]")
    deployed.wait_whole()
    for name, value in deployed.environment.items():
        monkeypatch.setenv(name, value)
    with connected(deployed.deployment):
        run_rows(deployed)


def run_rows(deployed: TinyDeployment) -> None:
    """A data set on the deployment's cluster; a group and a gateway are killed under its rows."""
    import ray

    from arriero.cluster.data import processor

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        content = f"Name {row['id']} things."
        return {"id": row["id"], "messages": [{"role": "user", "content": content}]}

    process = processor(
        model="tiny",
        sampling={"max_tokens": 24, "ignore_eos": True},
        preprocess=preprocess,
        batch_size=20,
        concurrency=2,
    )
    num_rows, num_kills = 600, len(deployed.kills)
    rng, names, tokens = random.Random(2), Counter[int](), Counter[int]()
    faults = {num_rows // 4: deployed.kill_group, num_rows // 2: deployed.kill_gateway}
    for row in process(ray.data.range(num_rows)).iter_rows():
        assert row["error"] is None, row["error"]
        names[row["id"]] += 1
        tokens[row["num_generated_tokens"]] += 1
        if fault := faults.pop(names.total(), None):
            fault(rng)
    assert deployed.kills[num_kills:] == ["group", "gateway"]
    assert names == Counter(range(num_rows))
    assert tokens == {24: num_rows}, "a resumed row has no token twice"
