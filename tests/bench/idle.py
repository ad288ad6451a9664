"""What an idle deployment costs: CPU of all its processes, beside that of bare Ray and Ray Serve.

Each in turn on a local cluster of its own: first Ray and Serve with as many trivial replicas as
the deployment has (its leaders and its gateway), then the deployment, with nobody asking. CPU is
user and system time of every process of the cluster's session, as a share of one core. Also says
how long `arriero up` took from the command to ready.

Usage: idle.py MODEL_DIR [--pp 2] [--groups 1] [--seconds 60] [--settle 15]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from arriero.cluster import deployment_file as state
from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.hosts import ray_access
from arriero.cluster.spec.deployment import RaySpec

TICKS = os.sysconf("SC_CLK_TCK")
LIMIT = 5.0
READY_S = 20.0
BARE = """
import sys, logging, ray
from ray import serve
from ray.serve.config import ProxyLocation
address, node, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
ray.init(address=address, _node_ip_address=node, namespace="bare", log_to_driver=False,
         logging_level=logging.ERROR)
serve.start(proxy_location=ProxyLocation.Disabled)

@serve.deployment(num_replicas=count, ray_actor_options={"num_cpus": 0.01},
                  health_check_period_s=1, health_check_timeout_s=5)
class Nothing:
    async def __call__(self) -> str:
        return ""

serve.run(Nothing.bind(), name="bare", route_prefix=None)
"""


def spent(session: int) -> dict[int, tuple[str, float]]:
    """By process of a session: what it is, and the seconds of CPU it has taken."""
    found = {}
    for pid in local.members(session):
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # ended since
        found[pid] = (name(command), (int(fields[11]) + int(fields[12])) / TICKS)
    return found


def name(command: list[bytes]) -> str:
    """A process in a word: Ray's own title of a worker, or its program."""
    first = command[0].decode(errors="replace")
    if first.startswith("ray::"):
        return re.sub(r"[^A-Za-z:.].*", "", first.removeprefix("ray::")) or first
    if Path(first).name.startswith("python"):
        words = [one.decode(errors="replace") for one in command[1:]]
        return next((Path(one).name for one in words if not one.startswith("-")), "python")
    return Path(first).name


def watch(session: int, settle_s: float, seconds: float) -> dict[str, float]:
    """Share of a core, in percent, of each kind of process over so many seconds."""
    time.sleep(settle_s)
    before, begun_s = spent(session), time.monotonic()
    time.sleep(seconds)
    after, elapsed_s = spent(session), time.monotonic() - begun_s
    total: Counter[str] = Counter()
    for pid, (what, now_s) in after.items():
        total[what] += now_s - before.get(pid, (what, 0.0))[1]
    return {what: round(100 * took_s / elapsed_s, 2) for what, took_s in total.most_common()}


def bare(count: int, settle_s: float, seconds: float) -> dict[str, float]:
    """Ray and Serve with `count` replicas that do nothing."""
    cluster = local.start(RaySpec())
    try:
        address = local.wait_address(cluster)
        arguments = [address, cluster.node_address, str(count)]
        environment = ray_access.changed(os.environ, cluster.access)
        command = [sys.executable, "-c", BARE, *arguments]
        subprocess.run(command, env=environment, check=True, timeout=120)
        return watch(cluster.session, settle_s, seconds)
    finally:
        local.stop(cluster)


def deployed(
    args: argparse.Namespace, settle_s: float, seconds: float
) -> tuple[dict[str, float], float]:
    """An idle deployment, and how many seconds its `up` took."""
    command = [sys.executable, "-m", "arriero.cluster.cli"]
    with tempfile.TemporaryDirectory(prefix="idle-") as folder:
        environment = os.environ | {"ARRIERO_STATE": folder}
        flags = ["--model", args.model, "--pp", str(args.pp), "--groups", str(args.groups)]
        begun_s = time.monotonic()
        try:
            subprocess.run(
                [*command, "up", *flags, "--port", "0", "--kv-memory", "128MiB"],
                env=environment, check=True, timeout=240, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            up_s = time.monotonic() - begun_s
            noted = state.read(Path(folder))
            assert noted is not None and noted.local_session is not None
            return watch(noted.local_session, settle_s, seconds), up_s
        finally:
            subprocess.run([*command, "down"], env=environment, check=True, timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--settle", type=float, default=15)
    args = parser.parse_args()
    without = bare(args.groups + 1, args.settle, args.seconds)
    print(json.dumps({"bare Ray and Serve": round(sum(without.values()), 1), "of": without}))
    with_it, up_s = deployed(args, args.settle, args.seconds)
    print(json.dumps({"idle arriero": round(sum(with_it.values()), 1), "of": with_it}))
    beyond = sum(with_it.values()) - sum(without.values())
    print(
        f"an idle deployment takes {beyond:.1f} % of a core beyond bare Ray and Serve"
        f" (at most {LIMIT:g}); `up` to ready {up_s:.1f} s (at most {READY_S:g})"
    )
    sys.exit(beyond > LIMIT or up_s > READY_S)


if __name__ == "__main__":
    main()
