"""Ray's private interfaces stand in one module, and the installed Ray is a tested one."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest
import ray

from arriero.cluster.hosts import ray_private

ROOT = Path(__file__).parents[3]
PRIVATE = re.compile(r"ray\._|internal_kv|\b_node_ip_address|\b_blocking=")


def test_only_one_module_calls_private_interfaces() -> None:
    callers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "cluster").rglob("*.py")
        if PRIVATE.search(path.read_text())
    }
    assert callers == {"cluster/hosts/ray_private.py"}


def test_the_bound_of_ray_follows_the_tested_versions() -> None:
    minor = ".".join(ray.__version__.split(".")[:2])
    assert minor in ray_private.TESTED
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = [line for line in project["dependencies"] if line.startswith("ray[serve]")]
    last = int(ray_private.TESTED[-1].partition(".")[2])
    assert bound == f"ray[serve]>={ray_private.TESTED[0]},<2.{last + 1}"


@pytest.mark.parametrize(
    ("host", "bound"), [("10.0.0.2", "10.0.0.2:0"), ("fd00::2", "[fd00::2]:0")]
)
def test_a_replicas_server_binds_to_its_node(
    host: str, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function exists in this version of Serve, and Serve's code calls it by this name."""
    from ray.serve._private import replica

    addresses: list[str] = []

    def add_port(server: object, address: str) -> int:
        addresses.append(address)
        return 1234

    monkeypatch.setattr(replica, "add_port_to_grpc_server", add_port)
    ray_private.bind_replica_server(host)
    assert replica.add_port_to_grpc_server(None, "[::]:0") == 1234
    assert addresses == [bound]
    source = inspect.getsource(replica)
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in source
