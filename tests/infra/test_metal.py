"""`infra/metal`: closed unless it is told otherwise. `ray` is a stand-in that records its call."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from stand_ins import Call, StandIns

ROOT = Path(__file__).parents[2]
METAL = ROOT / "infra" / "metal"
UNITS = sorted(METAL.glob("*.service"))
HARDENED = {
    "NoNewPrivileges", "ProtectSystem", "ProtectHome", "ProtectKernelTunables",
    "ProtectKernelModules", "ProtectControlGroups", "RestrictSUIDSGID", "CapabilityBoundingSet",
    "SystemCallFilter", "UMask", "StateDirectoryMode",
}  # fmt: skip
MOST_EXPOSED = 2.5
"""Of `systemd-analyze security`, out of 10; a unit without any hardening has 9.2."""


@pytest.fixture
def ray(tmp_path: Path) -> StandIns:
    ray = StandIns(tmp_path)
    ray.add("ray")
    return ray


def run(
    script: str, ray: StandIns, folder: Path, **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = ray.environment(HOME=str(folder), STATE_DIRECTORY=str(folder / "state"))
    return subprocess.run(
        [str(METAL / script)],
        env=environment | settings, capture_output=True, text=True, timeout=30,
    )  # fmt: skip


def start(script: str, ray: StandIns, folder: Path, **settings: str) -> Call:
    done = run(script, ray, folder, **settings)
    assert done.returncode == 0, done.stderr
    return ray.calls()[-1]


def test_a_head_alone_is_closed(ray: StandIns, tmp_path: Path) -> None:
    call = start("head.sh", ray, tmp_path)
    assert call.flag("--node-ip-address") == "127.0.0.1"
    assert call.environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0", "Ray: bind to loopback"
    assert call.environment["RAY_AUTH_MODE"] == "token"
    token = Path(call.environment["RAY_AUTH_TOKEN_PATH"])
    assert len(token.read_text()) == 64 and token.stat().st_mode & 0o077 == 0
    assert call.flag("--include-dashboard") == "false"
    assert call.environment["DASHBOARD_METRIC_PORT"] == "-1", "else metrics on every interface"
    folder = Path(call.flag("--temp-dir") or "")
    assert folder.parent.stat().st_mode & 0o777 == 0o700, "Ray's own folder is open to everybody"
    assert "RAY_REDIS_ADDRESS" not in call.environment
    again = start("head.sh", ray, tmp_path)
    assert again.environment["RAY_AUTH_TOKEN_PATH"] == str(token)
    assert len(token.read_text()) == 64, "the token stays"


def test_a_head_on_a_network_asks_for_the_token_too(ray: StandIns, tmp_path: Path) -> None:
    call = start("head.sh", ray, tmp_path, NODE_IP="10.0.0.1", RAY_AUTH_MODE="disabled", CPUS="0")
    assert call.flag("--node-ip-address") == "10.0.0.1" and call.flag("--num-cpus") == "0"
    assert call.environment["RAY_AUTH_MODE"] == "token"
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in call.environment


def test_a_heads_tables_go_to_redis(ray: StandIns, tmp_path: Path) -> None:
    refused = run("head.sh", ray, tmp_path, REDIS="10.0.0.9:6379")
    assert refused.returncode != 0 and "give the file" in refused.stderr
    (tmp_path / "password").write_text("secret\n")
    call = start(
        "head.sh", ray, tmp_path,
        REDIS="10.0.0.9:6379", REDIS_PASSWORD_FILE=str(tmp_path / "password"),
    )  # fmt: skip
    assert call.environment["RAY_REDIS_ADDRESS"] == "10.0.0.9:6379"
    assert call.environment["RAY_external_storage_namespace"] == "arriero"
    assert call.flag("--redis-password") == "secret"


def test_a_worker_says_what_it_needs(ray: StandIns, tmp_path: Path) -> None:
    done = run("worker.sh", ray, tmp_path)
    assert done.returncode != 0 and "give" in done.stderr
    done = run("worker.sh", ray, tmp_path, HEAD="10.0.0.1:6379", NODE_IP="10.0.0.2")
    assert done.returncode == 2 and "no token" in done.stderr
    token = tmp_path / "state" / "ray.token"
    token.parent.mkdir()
    token.write_text("t" * 64)
    token.chmod(0o644)
    done = run("worker.sh", ray, tmp_path, HEAD="10.0.0.1:6379", NODE_IP="10.0.0.2")
    assert done.returncode == 2 and "others can read" in done.stderr
    assert not ray.calls()
    token.chmod(0o600)
    call = start(
        "worker.sh", ray, tmp_path,
        HEAD="10.0.0.1:6379", NODE_IP="10.0.0.2", IFACE="eth1", GPUS="8",
    )  # fmt: skip
    assert call.flag("--address") == "10.0.0.1:6379" and call.flag("--num-gpus") == "8"
    assert call.environment["NCCL_SOCKET_IFNAME"] == "eth1"
    assert call.environment["RAY_AUTH_MODE"] == "token"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(ray: StandIns, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    done = run("head.sh", ray, tmp_path, TEMP_DIR=str(theirs / "ray"))
    assert done.returncode == 2 and "another user" in done.stderr


def test_start_commands_are_ray_starts(ray: StandIns, tmp_path: Path) -> None:
    from ray.scripts.scripts import start as ray_start

    known = {flag for parameter in ray_start.params for flag in parameter.opts}
    (tmp_path / "password").write_text("secret")
    call = start(
        "head.sh", ray, tmp_path,
        REDIS="h:1", REDIS_PASSWORD_FILE=str(tmp_path / "password"),
    )  # fmt: skip
    worker = start("worker.sh", ray, tmp_path, HEAD="h:1", NODE_IP="10.0.0.2", CPUS="2", GPUS="1")
    for command in (call, worker):
        assert {word for word in command.args if word.startswith("--")} <= known


@pytest.mark.parametrize("raylet", [True, False])
def test_a_start_that_hangs_without_a_raylet_is_ended(
    raylet: bool, ray: StandIns, tmp_path: Path
) -> None:
    """`ray start` may hang after its raylet has died; systemd starts only what has ended."""
    if raylet:
        shutil.copy(shutil.which("sleep") or "", ray.bin / "raylet")
    start = 'import subprocess; subprocess.Popen(["raylet", "9"]); ' if raylet else ""
    ray.add("ray", f"{start}import time; time.sleep(4)")
    environment = ray.environment(HOME=str(tmp_path), STATE_DIRECTORY=str(tmp_path / "state"))
    done = subprocess.run(
        [str(METAL / "head.sh")], env=environment | {"START_LIMIT_S": "1"}, timeout=60,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == (0 if raylet else -signal.SIGKILL), done.stderr
    assert ("no raylet after 1 s" in done.stderr) is not raylet


# ---- units ----


def service(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit.read_text())
    assert {"Unit", "Service", "Install"} == set(parser.sections())
    return parser["Service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_say_what_a_node_needs(unit: Path) -> None:
    section = service(unit)
    (command,) = re.findall(r"^ExecStart=/opt/arriero/(.+)$", unit.read_text(), re.MULTILINE)
    assert (ROOT / command).exists()
    assert section["Restart"] == "always" and section["LimitMEMLOCK"] == "infinity"
    assert int(section["LimitNOFILE"]) >= 65_536
    # longer than groups drain, or systemd kills what still hands over
    assert int(section["TimeoutStopSec"]) > 300


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_hardened(unit: Path, tmp_path: Path) -> None:
    section = service(unit)
    assert set(section) >= HARDENED
    assert section["StateDirectoryMode"] == "0700" and section["UMask"] == "0077"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze (Debian: systemd): only the fields are checked")
    text = unit.read_text().replace("/opt/arriero/infra", str(ROOT / "infra"))
    copy = tmp_path / unit.name
    copy.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60
    )
    assert unit.name not in done.stderr, done.stderr
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", str(copy)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    level = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert level is not None, done.stdout + done.stderr
    assert float(level[1]) <= MOST_EXPOSED
