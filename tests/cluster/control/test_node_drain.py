"""Names of nodes, and the groups that leave drained nodes."""

from __future__ import annotations

import pytest

from arriero.cluster.control.node_drain import Node, find_node, groups_on, leaving
from arriero.cluster.hosts.capacity import ClusterCapacity, PlacementBundles
from arriero.cluster.registry.snapshot import GroupEntry
from arriero.cluster.spec.model import ModelSpec
from arriero.shards.errors import InvalidRequest, NotFound

NODES = [
    Node(id="aaaa1111", address="10.0.0.1", hostname="one"),
    Node(id="aaaa2222", address="10.0.0.2", hostname="two"),
    Node(id="bbbb3333", address="10.0.0.3", hostname="three", alive=False),
]


@pytest.mark.parametrize("name", ["10.0.0.2", "two", "aaaa2222", "aaaa2"])
def test_a_node_has_several_names(name: str) -> None:
    assert find_node(name, NODES).id == "aaaa2222"


@pytest.mark.parametrize("name", ["nope", "10.0.0.3", "aaa", ""])
def test_no_such_node(name: str) -> None:
    with pytest.raises(NotFound, match=r"the nodes are 10.0.0.1 \(aaaa1111\)"):
        find_node(name, NODES)


def test_a_name_of_several_nodes() -> None:
    with pytest.raises(InvalidRequest, match="names several nodes"):
        find_node("aaaa", NODES)


def group(seat: str, *node_ids: str) -> GroupEntry:
    return GroupEntry(
        group_id=f"{seat}.1",
        model=seat.rpartition("-")[0],
        address="",
        seat=seat,
        node_id=node_ids[0],
        slice_node_ids=node_ids[1:],
    )


def test_groups_leave_where_others_have_room() -> None:
    groups = [group("m-0", "a", "a"), group("m-1", "b", "b", "a"), group("n-0", "a"),
              group("m-2", "b", "b")]  # fmt: skip
    assert [entry.seat for entry in groups_on(["a"], groups)] == ["m-0", "m-1", "n-0"]
    assert leaving(["a"], groups, lambda model: model == "m") == {"m": frozenset({"m-0", "m-1"})}
    assert leaving([], groups, lambda model: True) == {}


def test_a_drained_node_takes_no_group() -> None:
    capacity = ClusterCapacity(
        num_cpus=8,
        num_gpus=0,
        cpus_per_slice=1.0,
        nodes=({"CPU": 4.0}, {"CPU": 2.0}),
        node_ids=("a", "b"),
    )
    assert capacity.without(["a"]).nodes == ({"CPU": 2.0},)
    model = ModelSpec.model_validate(
        {"name": "m", "path": "/m", "placement": {"labels": {"zone": "x"}}}
    )
    (_, selector) = PlacementBundles.of(model).labels(["a", "b"])[
        "placement_group_bundle_label_selector"
    ]
    assert selector == {"zone": "x", "ray.io/node-id": "!in(a,b)"}
