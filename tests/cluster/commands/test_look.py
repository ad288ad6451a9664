"""Commands that look: logs that go on, a status without a head, tables of 80 columns."""

from __future__ import annotations

import io
import signal
import socket
import time
from pathlib import Path

import pytest
from rich.console import Console

from arriero.cluster import cli, interrupts
from arriero.cluster import deployment_file as state
from arriero.cluster.commands.operations import lines_after
from arriero.cluster.commands.top import view
from arriero.cluster.commands.views import status_view
from arriero.router.proto.arriero.v1 import admin_pb2 as pb


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ([], ["a"], ["a"]),
        (["a"], ["a"], []),
        (["a", "b"], ["a", "b", "c"], ["c"]),
        (["a", "b", "c"], ["b", "c", "d", "e"], ["d", "e"]),
        (["x", "x"], ["x", "x", "x"], ["x"]),
        (["a"], ["d", "e"], ["d", "e"]),  # the log grew by more than is asked for
    ],
)
def test_new_lines_of_a_log(before: list[str], now: list[str], new: list[str]) -> None:
    assert lines_after(before, now) == new


def test_a_status_without_a_head_tells_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARRIERO_STATE", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as gateway:
        address = f"127.0.0.1:{gateway.getsockname()[1]}"
        deployment = state.Deployment(
            ray_address="127.0.0.1:1",
            gateway=address,
            admin="127.0.0.1:2",
            local_session=2**22 + 1,  # no process
            local_folder=str(tmp_path / "gone"),
        )
        state.write(tmp_path, deployment)
        begun_s = time.monotonic()
        assert cli.run(["status"]) == 3
    assert time.monotonic() - begun_s < 5
    said = capsys.readouterr().err
    assert "the head of the local Ray cluster has ended; `arriero down` ends the rest" in said
    assert f"gateway at {address} still listens; Admin at 127.0.0.1:2 is gone" in said
    assert "Ray at 127.0.0.1:1, local, no process runs" in said


def long_status() -> pb.Status:
    status = pb.Status()
    status.nodes.add(id="a" * 56, address="10.0.0.1", alive=True, head=True, cpus=64, cpus_free=2.5)
    status.nodes.add(id="b" * 56, address="10.0.0.2", alive=True, draining=True, groups=["m-0.1"])
    status.models.add(model="m", paused=True, deadline_left_s=12.0, revision=2)
    status.groups.add(
        seat="llama-3.1-405b-instruct-0",
        id="llama-3.1-405b-instruct-0.12",
        phase="serving",
        layout="TP8 x PP2 bfloat16",
        running=120,
        waiting=4000,
        blocks_used=18000,
        blocks_total=18200,
    )
    return status


def test_top_fits_80_columns() -> None:
    for width in (80, 120):
        console = Console(width=width, file=io.StringIO())
        console.print(view((0.0, long_status()), (1.0, long_status()), width))
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert "…" not in text and "serving" in text and "4000" in text
        assert max(map(len, text.splitlines())) <= width
        assert ("TP8" in text) == (width == 120)


def test_the_status_shows_nodes_and_rollouts() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(status_view(long_status()))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "the rollout is paused; 12 s until the rollout is taken back" in text
    assert "10.0.0.1 (aaaaaaaa)" in text and "up, head" in text and "2.5 of 64" in text
    assert "draining" in text and "m-0.1" in text


def test_a_second_interrupt_does_not_cut_a_clean_up() -> None:
    pending = interrupts.Interrupts()
    cleaned = False
    with interrupts.handled(pending.handle), pytest.raises(KeyboardInterrupt):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)  # the second press of a double one
            with interrupts.ignored():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                cleaned = True
            raise
    assert cleaned


def test_sigterm_ends_with_143() -> None:
    pending = interrupts.Interrupts()
    with interrupts.handled(pending.handle), pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


def test_a_deferred_interrupt_comes_after_the_block() -> None:
    steps = []
    with interrupts.handled(interrupts.Interrupts().handle), pytest.raises(KeyboardInterrupt):
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            steps.append("noted")
        steps.append("never")
    assert steps == ["noted"]
