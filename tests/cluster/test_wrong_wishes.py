"""Wrong specs and wishes: a clear answer within three seconds, and nothing is touched.

With ARRIERO_TABLE=FILE the test also writes its table: wish, seconds, answer, what was touched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from arriero.cluster import cli
from arriero.cluster import deployment_file as state
from arriero.cluster.commands.operations import plain
from arriero.cluster.control.admin_client import AdminClient
from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.hosts import this_machine
from support.command import arriero
from support.wishes import BEFORE, LIVE, Bench, Wish, make_model

WITHIN_S = 3.0


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    wish: str
    seconds: float
    code: int
    answer: str


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """The rows of the table, which is written at the end."""
    rows: list[Row] = []
    yield rows
    if path := os.environ.get("ARRIERO_TABLE"):
        lines = ["| wish | s | exit code | answer | touched |", "|---|---|---|---|---|"]
        for row in rows:
            answer = row.answer.replace("|", "\\|")
            lines.append(f"| {row.wish} | {row.seconds:.2f} | {row.code} | {answer} | nothing |")
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Path]:
    """The state folder of a deployment of the model, which all rows of LIVE share."""
    folder = tmp_path_factory.mktemp("state")
    try:
        arriero("up", Bench(folder, model).spec(), folder=folder)
        yield folder
    finally:
        arriero("down", folder=folder)


def groups(folder: Path) -> list[dict[str, Any]]:
    """What must not change: ids, processes and revisions of the groups."""
    deployment = state.read(folder)
    assert deployment is not None
    with AdminClient.of(deployment) as client:
        status = client.status()
    kept = ("id", "seat", "revision", "phase", "pid", "slice_pids")
    assert all(model.settled and model.groups == 1 for model in status.models)
    return [{name: plain(group)[name] for name in kept} for group in status.groups]


WISHES = [pytest.param(wish, id=wish.name) for wish in BEFORE] + [
    pytest.param(wish, id=wish.name, marks=[pytest.mark.ray, pytest.mark.timeout(300)])
    for wish in LIVE
]


@pytest.mark.parametrize("wish", WISHES)
def test_a_wrong_wish_is_refused_and_touches_nothing(
    wish: Wish,
    model: Path,
    tmp_path: Path,
    rows: list[Row],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder: Path = request.getfixturevalue("serving") if wish.live else tmp_path / "state"
    before = groups(folder) if wish.live else []

    def start(spec: object) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(local, "start", start)
    if wish.machine is not None:
        monkeypatch.setattr(this_machine, "resources", lambda spec: wish.machine)
    monkeypatch.setenv("ARRIERO_STATE", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    bench = Bench(tmp_path, model)
    with bench.cleanup:
        command = wish.command(bench)
        begun_s = time.monotonic()
        code = cli.run(command)
        seconds = time.monotonic() - begun_s
    answer = capsys.readouterr().err.splitlines()[-1]
    rows.append(Row(wish.name, seconds, code, answer.replace(str(tmp_path), "…")))
    assert code == wish.code, answer
    assert all(text in answer for text in wish.says), answer
    assert "Traceback" not in answer and "Tuple should" not in answer
    assert seconds < WITHIN_S, answer
    if wish.live:
        assert groups(folder) == before
    else:
        assert not (folder / "deployment.json").exists()
