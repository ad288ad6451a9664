"""What the doctor says of nodes that are well, and of those that are not."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from arriero.cluster.hosts import doctor as checkup
from arriero.cluster.hosts.doctor import Facts, Finding, judge
from arriero.cluster.hosts.listeners import beyond_loopback

WELL = Facts(
    host="a",
    python="3.12.1",
    packages=dict.fromkeys(checkup.PACKAGES, "1.0"),
    clock_s=0.0,
    cores=64,
    memory_bytes=1 << 40,
    shm_bytes=1 << 34,
    files=1 << 20,
    disks={"/": (1 << 40, 1 << 41)},
    models={"/models/m": True},
    driver="570.1",
    gpus=("H100",) * 8,
    nccl="2.27.3",
    ports={50051: ""},
)


def grades(facts: Facts, skew_s: float = 0.0) -> dict[str, str]:
    found = judge({"n": facts}, {"n": skew_s})
    return {one.text: one.remedy for one in found if one.grade != "ok"}


def test_a_node_that_is_well() -> None:
    assert grades(WELL) == {}


def test_each_fault_has_a_remedy() -> None:
    ill = {
        "files": 1024,
        "shm_bytes": 1 << 20,
        "disks": {"/": (1, 1 << 41)},
        "models": {"/models/m": False},
        "gpus": ("H100", "A100"),
        "nccl": "",
        "ports": {50051: "cannot be bound: Address already in use"},
        "peers": {"10.0.0.2": "No route to host"},
        "disk_needs": {"/": 1 << 42},
        "packages": {**WELL.packages, "torch": ""},
    }
    for name, value in ill.items():
        found = grades(replace(WELL, **{name: value}))  # type: ignore[arg-type]
        assert len(found) == 1, name
        assert all(found.values()), name
    assert "synchronise" in next(iter(grades(WELL, skew_s=2.0).values()))


def test_nodes_that_differ() -> None:
    other = replace(WELL, packages={**WELL.packages, "ray": "2.0"}, driver="560.2")
    said = [one.text for one in judge({"a": WELL, "b": other}, {}) if one.node == "all"]
    assert len(said) == 2
    assert "ray differs: 1.0 on a, 2.0 on b" in said[0]
    assert "560.2, 570.1" in said[1]


def test_this_machine_can_be_looked_at() -> None:
    with closing(checkup.ProbeListener("127.0.0.1")) as ear:
        needs = checkup.NodeNeeds(
            models=("/nowhere",),
            ports=(0,),
            disks={"/nowhere/at/all": 1 << 60},
            peers=(("127.0.0.1", ear.port()), ("127.0.0.2", 1)),
        )
        facts = checkup.collect(needs)
    assert facts.cores >= 1 and facts.packages["ray"] and facts.models == {"/nowhere": False}
    assert facts.ports == {0: ""}
    assert facts.peers == {"127.0.0.1": "", "127.0.0.2": "Connection refused"}
    assert facts.disk_needs == {"/": 1 << 60}
    assert any("may need" in one.text for one in judge({"n": facts}, {}))


def test_what_other_machines_reach() -> None:
    def said(facts: Facts) -> Finding:
        return next(one for one in judge({"a": facts}, {}) if "Ray listens" in one.text)

    assert said(WELL).grade == "ok" and "loopback alone" in said(WELL).text
    open_ = replace(WELL, listeners={"gcs_server": (6379,), "raylet": (4001, 4002)})
    assert said(open_).grade == "warn" and "RAY_AUTH_MODE=token" in said(open_).remedy
    assert "gcs_server 6379, raylet 4001 4002" in said(open_).text
    assert said(replace(open_, ray_token=True)).grade == "ok"


def test_listeners_are_read_from_proc(tmp_path: Path) -> None:
    """A folder of /proc's form: of Ray's processes only what binds to more than loopback."""
    row = "0: {} 00000000:0000 {} 00000000:00000000 00:00000000 00000000 0 0 {} 1 0"
    tables = {
        "tcp": [
            row.format("0100007F:18EB", "0A", 71),  # 127.0.0.1:6379
            row.format("00000000:18EC", "0A", 72),  # every interface
            row.format("0200000A:18ED", "0A", 73),  # 10.0.0.2
            row.format("00000000:18EE", "01", 74),  # connected
        ],
        "tcp6": [
            row.format("0000000000000000FFFF00000100007F:18EF", "0A", 75),  # ::ffff:127.0.0.1
            row.format("00000000000000000000000000000000:18F0", "0A", 76),  # every interface
        ],
    }
    (tmp_path / "net").mkdir()
    for name, rows in tables.items():
        (tmp_path / "net" / name).write_text("\n".join(["header", *rows]))
    commands = {
        "10": ("/ray/gcs_server\0--port", (71, 72, 74)),
        "11": ("ray::Leader.run", (73, 75)),
        "12": ("python\0/site-packages/ray/dashboard/agent.py", (76,)),
        "13": ("nginx", (72,)),
    }
    for pid, (command, inodes) in commands.items():
        (tmp_path / pid / "fd").mkdir(parents=True)
        (tmp_path / pid / "cmdline").write_text(command)
        for inode in inodes:
            (tmp_path / pid / "fd" / str(inode)).symlink_to(f"socket:[{inode}]")
    assert beyond_loopback(tmp_path) == {
        "agent.py": (6384,), "gcs_server": (6380,), "ray::Leader": (6381,)
    }  # fmt: skip
