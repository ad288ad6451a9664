"""A local cluster whose head is gone, and the logs that a failed start leaves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.cluster import deploy
from arriero.cluster import deployment_file as state
from arriero.cluster.connection import connected
from arriero.cluster.deployment_file import Deployment
from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.hosts.local_cluster import LocalCluster
from arriero.cluster.spec.deployment import RaySpec
from arriero.shards.errors import SpecError, Unavailable
from support.command import arriero


def test_the_logs_are_moved_before_the_folder_is_removed(tmp_path: Path) -> None:
    folder, kept = tmp_path / "ray", tmp_path / "kept"
    logs = folder / "session_1" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.err").write_text("no memory")
    (folder / "session_latest").symlink_to("session_1")
    (folder / "start.log").write_text("started")
    kept.mkdir()
    (kept / "old.err").write_text("of the start before")
    cluster = LocalCluster(session=2**22 + 1, folder=folder, node_address="127.0.0.1")
    local.stop(cluster, keep_logs=kept)
    assert not folder.exists()
    assert sorted(path.name for path in kept.iterdir()) == ["raylet.err", "start.log"]
    assert (kept / "raylet.err").read_text() == "no memory"


def kill_head(cluster: LocalCluster) -> None:
    """Kill the GCS with SIGKILL; all other processes still run."""
    for pid in local.members(cluster.session):
        program = Path("/proc", str(pid), "cmdline").read_bytes().partition(b"\0")[0]
        if program.endswith(b"/gcs_server"):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while local.has_head(cluster):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.fixture
def headless(tmp_path: Path) -> Iterator[tuple[LocalCluster, Path]]:
    """A local cluster whose head was killed, noted as a deployment in a state folder."""
    cluster = local.start(RaySpec(num_cpus=2))
    try:
        address = local.wait_address(cluster)
        assert local.has_head(cluster)
        deployment = Deployment(
            ray_address=address,
            node_address=cluster.node_address,
            gateway="127.0.0.1:9",
            admin="127.0.0.1:9",
            local_session=cluster.session,
            local_folder=str(cluster.folder),
            ray_token=cluster.token,
        )
        state.write(tmp_path, deployment)
        with pytest.raises(SpecError, match="up already"):
            deploy._remove_dead(deployment, tmp_path, print)
        kill_head(cluster)
        assert local.is_alive(cluster)  # the raylet outlives the head by a minute
        yield cluster, tmp_path
    finally:
        local.stop(cluster)


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_without_its_head_a_cluster_is_refused_and_removed(
    headless: tuple[LocalCluster, Path],
) -> None:
    cluster, folder = headless
    deployment = state.read(folder)
    assert deployment is not None
    start_s = time.monotonic()
    with pytest.raises(Unavailable, match=r"head .* has ended; `arriero down`"):
        with connected(deployment):
            pass
    assert time.monotonic() - start_s < 5
    for command, code in (("status", 3), ("logs operator", 3), ("scale m 2", 3), ("doctor", 3)):
        result = arriero(*command.split(), folder=folder, check=False)
        assert result.returncode == code and "Traceback" not in result.stderr, result
        assert result.stderr.splitlines()[-1].startswith("arriero: "), result
    deploy._remove_dead(deployment, folder, print)
    assert local.members(cluster.session) == [] and state.read(folder) is None
    assert not cluster.folder.exists()


@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.parametrize("force", [False, True])
def test_down_ends_the_rest_without_its_head(
    headless: tuple[LocalCluster, Path], force: bool
) -> None:
    cluster, folder = headless
    start_s = time.monotonic()
    assert deploy.down(folder, lambda text: None, force=force)
    assert time.monotonic() - start_s < 10
    assert local.members(cluster.session) == [] and state.read(folder) is None
