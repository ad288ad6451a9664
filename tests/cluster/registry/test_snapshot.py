"""What a registry's snapshot counts for the metrics of gateways."""

from __future__ import annotations

from arriero.cluster.registry.snapshot import GroupEntry, RegistrySnapshot
from arriero.router.observability.model_groups import ModelGroups


def entry(seat: str, epoch: int, phase: str = "serving") -> GroupEntry:
    return GroupEntry(
        group_id=f"{seat}.{epoch}", model=seat.rpartition("-")[0], address="", seat=seat,
        epoch=epoch, phase=phase, start_s=2.5,
    )  # fmt: skip


def test_counts_are_of_each_model_that_is_wanted_or_serves() -> None:
    snapshot = RegistrySnapshot(
        version=1,
        groups=(entry("big-7b-0", 3), entry("big-7b-1", 1, phase="draining"), entry("left-0", 1)),
        gateways=(),
        progress={},
        failures=(),
        wanted={"big-7b": 2, "small": 1, "asleep": 0},
        epochs={"big-7b-0": 3, "big-7b-1": 1, "left-0": 1},
    )
    assert snapshot.model_groups() == {
        "big-7b": ModelGroups(wanted=2, starts=4, start_s={"big-7b-0.3": 2.5}),
        "left": ModelGroups(wanted=0, starts=1, start_s={"left-0.1": 2.5}),
        "small": ModelGroups(wanted=1),
        "asleep": ModelGroups(),
    }
