"""The cores of this machine, and the memory that is near them: hyperthreads and NUMA nodes.

Knows Linux's /sys and the CPUs that this process may use; knows nothing of threads and of slices.
Without /sys, each CPU is a core of a single node.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/sys/devices/system")

Core = tuple[int, ...]
"""CPU numbers of a core: its hyperthreads."""


def allowed_cpus() -> frozenset[int]:
    """CPUs that this thread may use."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return frozenset(range(os.cpu_count() or 1))


def cores(cpus: Iterable[int] | None = None, system: Path = SYSTEM) -> list[Core]:
    """The cores of some CPUs, in rising order.

    Two hyperthreads share the units that multiply and the first two caches: a second thread on a
    core makes a product no faster, and both threads slower.

    Args:
        cpus: CPU numbers; None takes those that this thread may use.
        system: the folder of the machine's description.
    """
    wanted = allowed_cpus() if cpus is None else frozenset(cpus)
    found = {
        tuple(sorted(_cpu_list(system / f"cpu/cpu{cpu}/topology/thread_siblings_list") & wanted))
        or (cpu,)
        for cpu in wanted
    }
    return sorted(found)


def nodes(system: Path = SYSTEM) -> list[frozenset[int]]:
    """CPUs of each NUMA node, of those that this thread may use; nodes without any are left out."""
    allowed = allowed_cpus()
    folders = sorted(system.glob("node/node[0-9]*"), key=lambda folder: int(folder.name[4:]))
    found = [_cpu_list(folder / "cpulist") & allowed for folder in folders]
    return [node for node in found if node] or [allowed]


@dataclass(frozen=True, slots=True)
class Place:
    """A slice among the slices of its group on the same machine.

    Attributes:
        index: number of the slice, from 0.
        count: number of slices.
    """

    index: int
    count: int


def near_cpus(place: Place, num_threads: int, system: Path = SYSTEM) -> frozenset[int] | None:
    """The CPUs for a slice whose threads and memory are to be on the same NUMA node.

    A core reads the memory of another node at about half the rate. The slices of a group go to the
    nodes in turn, if each node gets as many: then all groups together load the nodes evenly.

    Args:
        place: of the slice.
        num_threads: threads of the slice.
        system: the folder of the machine's description.

    Returns:
        CPU numbers of a node. None, and the system places the threads, on a machine of a single
        node, if the nodes would get different numbers of slices, and if a node has fewer cores than
        its slices have threads.
    """
    found = nodes(system)
    if len(found) == 1 or place.count % len(found):
        return None
    node = found[place.index % len(found)]
    enough = place.count // len(found) * num_threads <= len(cores(node, system))
    return node if enough else None


def stay_near(place: Place, num_threads: int) -> None:
    """Keep this thread, and threads that it starts from now on, on the CPUs of `near_cpus`.

    Memory that these threads write first is of the same node.
    """
    cpus = near_cpus(place, num_threads)
    if cpus is not None:
        os.sched_setaffinity(0, cpus)


def _cpu_list(file: Path) -> frozenset[int]:
    """CPU numbers of a file such as "0-3,8-11"; none if there is no such file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return frozenset()
    ends = (part.partition("-") for part in text.split(",") if part)
    return frozenset(
        cpu for first, _, last in ends for cpu in range(int(first), int(last or first) + 1)
    )
