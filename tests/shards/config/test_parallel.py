"""The mesh of a group: ranks, coordinates, and refusals that name field, value and limit."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import SpecError

DENSE = {"num_layers": 30, "num_heads": 9, "num_experts": 0}
MIXTURE = {"num_layers": 48, "num_heads": 40, "num_experts": 16}


@pytest.mark.parametrize("mesh", [ParallelConfig(tp=3, dp=2, pp=4), ParallelConfig()])
def test_coordinates_count_every_rank_in_order(mesh: ParallelConfig) -> None:
    at = [mesh.coordinates(rank) for rank in range(mesh.world_size)]
    places = [(place.stage, place.dp_rank, place.tp_rank) for place in at]
    axes = (range(mesh.pp), range(mesh.dp), range(mesh.tp))
    assert places == [(stage, dp, tp) for stage in axes[0] for dp in axes[1] for tp in axes[2]]
    assert [mesh.dp_rank_of(rank) for rank in range(mesh.world_size)] == [dp for _, dp, _ in places]


def test_a_group_is_a_mesh_and_more() -> None:
    config = GroupConfig(model_path="m", tp=2, dp=3, pp=4)
    assert (config.stage_size, config.world_size, config.num_expert_parts) == (6, 24, 6)
    assert str(config) == "TP2xDP3xPP4"
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("mesh", "model", "text"),
    [
        ({"tp": 10}, DENSE, "`tp`=10 must be 1 to 9, the model's query heads"),
        ({"pp": 0}, DENSE, "`pp`=0 must be 1 to 30, the model's layers"),
        ({"dp": 0}, MIXTURE, "`dp`=0 must be at least 1"),
        ({"dp": 2}, DENSE, "`dp`=2, `ep`=None: a dense model has no experts"),
        ({"ep": 2}, DENSE, "`dp`=1, `ep`=2: a dense model has no experts"),
        ({"tp": 2, "tp_shares": (1.0,)}, DENSE, "`tp_shares` has 1 entries for tp=2; give 2"),
        ({"tp": 2, "tp_shares": (1.0, -1.0)}, DENSE, "must be 2 positive numbers"),
        ({"pp": 2, "layer_split": (10, 10)}, DENSE, "adds up to 20; it must add up to 30"),
        ({"tp": 4, "ep": 3}, MIXTURE, "`ep`=3 must divide the 4 ranks of a stage"),
        ({"tp": 20, "ep": 20}, MIXTURE, "`ep`=20 must divide .* at most 16"),
        ({"tp": 2, "dp": 2, "ep": 2}, MIXTURE, "`ep`=2: with `dp`=2 .* all 4 slices"),
    ],
)
def test_refusals(mesh: dict[str, Any], model: dict[str, int], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        ParallelConfig(**mesh).check_fits(**model)
