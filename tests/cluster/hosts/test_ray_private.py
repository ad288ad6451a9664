"""Ray's private interfaces stand in one module, and the installed Ray is a tested one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

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
