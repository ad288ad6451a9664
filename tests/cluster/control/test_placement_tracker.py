"""What `up` and `status` say about a group that waits for a placement."""

from __future__ import annotations

from pathlib import Path

import pytest

from arriero.cluster.control.reconcile import GroupSeat, Phase
from arriero.cluster.hosts import ray_private
from arriero.cluster.spec.model import ModelSpec

SEAT = GroupSeat(name="m-0", model="m", revision=1, phase=Phase.STARTING)


@pytest.mark.filterwarnings("ignore")  # of the import of Ray Serve
@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({}, "it needs 4 CPUs on one node; the node with most has 2.5 CPUs free"),
        (
            {"pp": 2},
            "it needs 2 times 4 CPUs, each on one node; 0 of these are free now; the node with"
            " most has 2.5 CPUs free",
        ),
    ],
)
def test_a_seat_that_waits_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: dict[str, int], words: str
) -> None:
    from arriero.cluster import app
    from arriero.cluster.control import placement_tracker

    capacity = app.ClusterCapacity(num_cpus=8, num_gpus=0, cpus_per_slice=1.0)
    free = {"a": {"CPU": 1.0}, "b": {"CPU": 2.5}}
    monkeypatch.setattr(ray_private, "free_resources", lambda: free)
    monkeypatch.setattr(placement_tracker, "_REPORT_AFTER_S", 0.0)
    model = ModelSpec.model_validate(
        {"name": "m", "path": str(tmp_path), "device": "cpu", "cpus_per_slice": 4, "mesh": mesh}
    )
    placements = placement_tracker.PlacementTracker()
    assert placements.problem("m-0", model, capacity) == ""
    placements.give_up([SEAT], started=(), surplus=())
    assert placements.problem("m-0", model, capacity) == f"waits for a placement: {words}"
    free["a"] = free["b"] = {"CPU": 4.0}
    assert placements.problem("m-0", model, capacity) == ""  # the placement is under way
    placements.give_up([SEAT], started=("m-0",), surplus=())  # its slices are placed
    assert placements.problem("m-0", model, capacity) == ""
