"""Cores and NUMA nodes, read from folders in the form of Linux's /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.kernels.cpu import threads, topology
from arriero.kernels.cpu.topology import Place


def machine(folder: Path, node_cpus: list[str], siblings: dict[int, str]) -> Path:
    """Write the description of a machine."""
    for number, cpus in enumerate(node_cpus):
        node = folder / f"node/node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(f"{cpus}\n")
    for cpu, others in siblings.items():
        core = folder / f"cpu/cpu{cpu}/topology"
        core.mkdir(parents=True)
        (core / "thread_siblings_list").write_text(f"{others}\n")
    return folder


@pytest.fixture
def two_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes of four cores, two hyperthreads each: CPU n and CPU n + 8 are a core."""
    monkeypatch.setattr(topology, "allowed_cpus", lambda: frozenset(range(16)))
    siblings = {cpu: f"{cpu % 8},{cpu % 8 + 8}" for cpu in range(16)}
    return machine(tmp_path, ["0-3,8-11", "4-7,12-15"], siblings)


def test_a_core_counts_once_for_all_its_hyperthreads(two_sockets: Path) -> None:
    assert topology.cores(system=two_sockets) == [(cpu, cpu + 8) for cpu in range(8)]
    assert topology.cores([1, 2, 9], two_sockets) == [(1, 9), (2,)]


def test_slices_go_to_the_nodes_in_turn(two_sockets: Path) -> None:
    first, second = topology.nodes(two_sockets)
    assert first == {0, 1, 2, 3, 8, 9, 10, 11}
    near = [topology.near_cpus(Place(index, 4), 2, two_sockets) for index in range(4)]
    assert near == [first, second, first, second]


@pytest.mark.parametrize(
    ("place", "num_threads"),
    [(Place(0, 1), 1), (Place(1, 3), 1), (Place(0, 2), 5), (Place(0, 4), 3)],
    ids=["one slice", "uneven", "more threads than cores", "two slices, more than a node's cores"],
)
def test_the_system_places_what_does_not_fit_evenly(
    two_sockets: Path, place: Place, num_threads: int
) -> None:
    assert topology.near_cpus(place, num_threads, two_sockets) is None


def test_only_allowed_cpus_count(two_sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "allowed_cpus", lambda: frozenset({0, 1, 8}))
    assert topology.cores(system=two_sockets) == [(0, 8), (1,)]
    assert topology.nodes(two_sockets) == [{0, 1, 8}]
    assert topology.near_cpus(Place(0, 2), 1, two_sockets) is None


def test_without_a_description_each_cpu_is_a_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "allowed_cpus", lambda: frozenset({3, 5}))
    assert topology.cores(system=tmp_path) == [(3,), (5,)]
    assert topology.nodes(tmp_path) == [{3, 5}]


def test_threads_are_at_most_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "cores", lambda: [(0, 4), (1, 5), (2, 6)])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads.available_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads.available_threads() == 2
