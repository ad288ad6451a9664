"""The stored state of the operator, across versions."""

from __future__ import annotations

import json

import pytest

from arriero.cluster.control.desired_state import ModelState, OperatorState, Revision, SeatState
from arriero.shards.errors import WireError
from arriero.shards.protocol import wire


def test_the_state_survives_its_store() -> None:
    settings = {"name": "m", "mesh": {"tp": 2}, "labels": None, "shares": [0.5, 1]}
    state = OperatorState(
        {"models": [settings]},
        True,
        admin_port=7,
        models={"m": ModelState(2, [Revision(1, settings, "d")], drained=["m-1"])},
        seats={"m-0": SeatState("m", 1, stopping=True)},
    )
    stored = json.loads(json.dumps(wire.to_builtins(state)))
    assert wire.from_builtins(stored, OperatorState) == state


def test_the_state_of_another_version_is_read() -> None:
    revision = {"number": 1, "settings": {"a": [1]}, "digest": "d", "later": 1}
    stored = {
        "spec": {"models": []},
        "shared": False,
        "token": "t",
        "models": {"m": {"count": 1, "revisions": [revision]}},
        "later": [],
    }
    state = wire.from_builtins(stored, OperatorState)
    assert state.models == {"m": ModelState(1, [Revision(1, {"a": [1]}, "d")])}
    assert (state.seats, state.live_version) == ({}, 0)
    del revision["digest"]
    with pytest.raises(WireError, match=r"`digest` - at `\$\.models\[\.\.\.\]\.revisions\[0\]`"):
        wire.from_builtins(stored, OperatorState)
