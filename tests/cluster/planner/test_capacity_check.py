"""The number of groups that nodes can hold, and changes that ask for more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from arriero.cluster.hosts.capacity import ClusterCapacity
from arriero.cluster.planner.capacity_check import (
    WantedGroups,
    can_hold,
    most_groups,
    refuse_beyond,
)
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.model import ModelSpec
from arriero.cluster.spec.safety import PromptGuardSpec
from arriero.shards.errors import SpecError


def model(name: str = "m", **more: Any) -> ModelSpec:  # noqa: ANN401
    return ModelSpec.model_validate({"name": name, "path": "/m", "device": "cpu"} | more)


def cluster(*cpus: float, gpus: float = 0) -> ClusterCapacity:
    nodes = tuple({"CPU": count, "GPU": gpus, "memory": 1e9} for count in cpus)
    num_gpus = gpus * len(cpus)
    return ClusterCapacity(num_cpus=sum(cpus), num_gpus=num_gpus, cpus_per_slice=1.0, nodes=nodes)


def wanted(count: int, spec: ModelSpec | None = None) -> WantedGroups:
    return WantedGroups(model=spec or model(), count=count)


@pytest.mark.parametrize(
    ("spec", "capacity", "most"),
    [
        (model(), cluster(4.1, 4.1), 8),
        (model(mesh={"tp": 2}), cluster(3.1, 3.1), 2),  # a stage stays on a node
        (model(mesh={"tp": 2}, placement={"span": True}), cluster(3.1, 3.1), 3),
        (model(mesh={"pp": 4}), cluster(3.1, 3.1), 1),
        (model(mesh={"tp": 4}), cluster(3.1, 3.1), 0),
        (model(cpus_per_slice=0.5), cluster(4.1), 8),
        (model(device="cuda", mesh={"tp": 2}), cluster(32, 32, gpus=4), 4),
        (model(placement={"accelerator": "H100"}), cluster(8), 0),
        (model(), cluster(), 0),
    ],
)
def test_groups_that_the_nodes_hold(spec: ModelSpec, capacity: ClusterCapacity, most: int) -> None:
    assert most_groups(spec, capacity) == most
    assert can_hold(spec, capacity) == bool(most)


@pytest.mark.parametrize(
    ("selector", "most"),
    [("west", 4), ("!west", 8), ("in(east,west)", 8), ("!in(east, west)", 4), ("north", 0)],
)
def test_labels_choose_the_nodes(selector: str, most: int) -> None:
    capacity = replace(
        cluster(4.1, 4.1, 4.1),
        node_labels=({"region": "west"}, {"region": "east"}, {"disk": "fast"}),
    )
    spec = model(placement={"labels": {"region": selector}})
    assert most_groups(spec, capacity) == most
    if not most:
        words = r"`placement.labels` \{region: north\} fits none of the 3"
        with pytest.raises(SpecError, match=words):
            refuse_beyond(capacity, [wanted(1, spec)], [])


def test_a_wrong_selector_is_refused_in_the_spec() -> None:
    with pytest.raises(ValidationError, match=r"write value, !value, in\(a,b\) or !in\(a,b\)"):
        model(placement={"labels": {"region": "in(west"}})


def test_other_models_take_room() -> None:
    other = wanted(2, model("other", mesh={"pp": 2}))
    assert most_groups(model(), cluster(4.1, 4.1), [other]) == 4


@pytest.mark.parametrize(
    ("replicas", "cpus", "most"), [(1, 1.0, 7), (2, 1.0, 6), (2, 0.5, 7), (4, 2.0, 0)]
)
def test_prompt_guard_takes_room(replicas: int, cpus: float, most: int) -> None:
    guard = PromptGuardSpec(path=Path("/p"), replicas=replicas, cpus=cpus)
    capacity = replace(cluster(4.1, 4.1), prompt_guard=guard)
    assert most_groups(model(), capacity) == most
    assert can_hold(model(), capacity) == bool(most)
    with pytest.raises(SpecError) as refused:
        refuse_beyond(capacity, [wanted(8)], [wanted(1)])
    words = str(refused.value)
    assert f"hold beside the {replicas * cpus:g} CPUs of Prompt Guard (a group needs 1 x" in words
    assert words.endswith("lower `gateway.prompt_guard.replicas` or `cpus`, or add nodes")
    refuse_beyond(capacity, [wanted(most)], [wanted(1)])


def test_prompt_guard_takes_no_gpus() -> None:
    spec = model(device="cuda", mesh={"tp": 2})
    guard = PromptGuardSpec(path=Path("/p"), replicas=3)
    assert most_groups(spec, replace(cluster(32, 32, gpus=4), prompt_guard=guard)) == 4


def test_prompt_guard_of_the_spec_is_counted() -> None:
    gateway = {"prompt_guard": {"path": "/p", "replicas": 3, "cpus": 2}}
    spec = DeploymentSpec.model_validate({"models": [model().model_dump()], "gateway": gateway})
    capacity = ClusterCapacity.of_nodes(spec, [{"CPU": 10.1}], shared=True)
    assert capacity.prompt_guard_cpus == 6
    assert most_groups(model(), capacity) == 4
    part = replace(capacity, node_ids=("a",)).without(["b"])
    assert most_groups(model(), part) == 4, "also beside drained nodes"


def test_too_few_gpus_hold_nothing() -> None:
    assert not can_hold(model(device="cuda", mesh={"tp": 8}), cluster(32, gpus=4))


def test_a_rollout_to_more_gpus_than_there_are() -> None:
    wide = model(device="cuda", mesh={"tp": 8})
    with pytest.raises(SpecError, match="8 slices need a GPU each, but the cluster has 4"):
        refuse_beyond(cluster(32, gpus=4), [wanted(1, wide)], [wanted(1)])


def test_more_groups_than_room_name_field_limit_and_remedy() -> None:
    with pytest.raises(SpecError) as refused:
        refuse_beyond(cluster(4.1), [wanted(1000)], [wanted(1)])
    assert str(refused.value) == (
        "model `m`: `groups`=1000 exceeds 4, the number that the 1 nodes of the cluster hold (a"
        " group needs 1 x (1 CPU), each on one node); lower `groups` to 4 or less, or add nodes"
    )
    refuse_beyond(cluster(4.1), [wanted(4)], [wanted(1)])


def test_a_mesh_that_no_node_holds() -> None:
    with pytest.raises(SpecError, match=r"`mesh` TP8 has 8 slices: .* lower `mesh.tp`"):
        refuse_beyond(cluster(4.1), [wanted(1, model(mesh={"tp": 8}))], [wanted(1)])


def test_after_the_loss_of_a_node_the_same_groups_pass() -> None:
    refuse_beyond(cluster(2.1), [wanted(4, model(dtype="float32"))], [wanted(4)])
    refuse_beyond(cluster(2.1), [wanted(3)], [wanted(4)])
    refuse_beyond(cluster(), [wanted(4), wanted(0, model("n"))], [wanted(4), wanted(1, model("n"))])
    with pytest.raises(SpecError, match="`groups`=5 exceeds 2"):
        refuse_beyond(cluster(2.1), [wanted(5)], [wanted(4)])
    with pytest.raises(SpecError, match="`groups`=4 exceeds 1"):
        refuse_beyond(cluster(2.1), [wanted(4, model(mesh={"pp": 2}))], [wanted(4)])
