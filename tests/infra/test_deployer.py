"""`deploy.sh` of Kubernetes: when it deploys, when it rolls out, and when it gives up.

`ray` and `arriero` are stand-ins; `tests/infra/test_live.py` runs the real ones.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from stand_ins import StandIns

SCRIPT = Path(__file__).parents[2] / "infra" / "kubernetes" / "base" / "deploy.sh"


@pytest.fixture
def commands(tmp_path: Path) -> StandIns:
    commands = StandIns(tmp_path)
    # `ray start --block` stays until it is stopped
    commands.add("ray", 'import time\nif sys.argv[1] == "start": time.sleep(60)')
    # pauses take no time here; the last one of the script's waits for Admin is 10 s
    commands.add("sleep", "import time; time.sleep(0.05)")
    return commands


class Running:
    """The script, while it runs."""

    def __init__(self, commands: StandIns, folder: Path, port: int) -> None:
        self.serves = folder / "serves"
        self._commands = commands
        environment = commands.environment(
            HEAD="head:6379",
            ARRIERO_ADMIN=f"127.0.0.1:{port}",
            ARRIERO_ADMIN_TOKEN_FILE=str(folder / "token"),
            SERVES=str(self.serves),
            TMPDIR=str(folder),
        )
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), "/spec/arriero.yaml"],
            env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def arriero(self) -> list[list[str]]:
        return [call.args for call in self._commands.calls() if call.name == "arriero"]

    def wait(self, condition: Callable[[], bool], limit_s: float = 20) -> None:
        deadline_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline_s, self._commands.calls()
            time.sleep(0.02)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


@pytest.fixture
def admin() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_it_deploys_where_nothing_serves(commands: StandIns, tmp_path: Path) -> None:
    tries = tmp_path / "tries"
    commands.add(  # the workers join after the first try
        "arriero", f"n = os.path.exists({str(tries)!r}); open({str(tries)!r}, 'w'); sys.exit(not n)"
    )
    running = Running(commands, tmp_path, free_port())
    running.wait(running.serves.exists)
    up = ["up", "/spec/arriero.yaml", "--address", "head:6379"]
    assert running.arriero() == [up, up]
    (node,) = [call for call in commands.calls() if call.args[:1] == ["start"]]
    assert (node.flag("--num-cpus"), node.flag("--num-gpus")) == ("0", "0"), "it offers nothing"
    assert node.flag("--address") == "head:6379"
    # Admin never listened: the head was lost, so the next start deploys again
    assert running.process.wait(timeout=60) == 1
    assert not running.serves.exists()


def test_it_rolls_an_edited_spec_out(
    commands: StandIns, tmp_path: Path, admin: socket.socket
) -> None:
    commands.add("arriero")
    running = Running(commands, tmp_path, admin.getsockname()[1])
    running.wait(running.serves.exists)
    assert running.arriero() == [["status", "--json"], ["rollout", "/spec/arriero.yaml"]]
    assert not [call for call in commands.calls() if call.args[:1] == ["start"]]
    assert running.process.poll() is None, "it stays while Admin listens"
    assert running.end() == 143
    assert not running.serves.exists()


def test_a_refused_rollout_is_seen(
    commands: StandIns, tmp_path: Path, admin: socket.socket
) -> None:
    commands.add("arriero", 'sys.exit(2 if sys.argv[1] == "rollout" else 0)')
    running = Running(commands, tmp_path, admin.getsockname()[1])
    assert running.process.wait(timeout=30) == 2
    assert not running.serves.exists()
