"""What differs between two specs, and what it takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.diff import diff, live_settings, refuse
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.shards.errors import SpecError
from arriero.shards.protocol import wire


def spec(model: dict[str, Any] | None = None, **parts: Any) -> DeploymentSpec:  # noqa: ANN401
    return DeploymentSpec.model_validate(
        {"models": [{"name": "m", "path": "/m", **(model or {})}], **parts}
    )


OLD = spec()


@pytest.mark.parametrize(
    ("new", "field", "applied_by"),
    [
        (spec(log_level="info"), "log_level", "reload"),
        (spec(gateway={"tenants": [{"name": "anyone"}]}), "gateway.tenants", "reload"),
        (spec(gateway={"queue": {"max_wait_s": 5}}), "gateway.queue", "reload"),
        (spec(gateway={"lost_s": 5}), "gateway.lost_s", "reload"),
        (spec(health={"hang_s": 5}), "health.hang_s", "reload"),
        (spec({"groups": 2}), "models[m].groups", "reload"),
        (spec({"autoscale": {"max": 3}}), "models[m].autoscale", "reload"),
        (spec(health={"period_s": 5}), "health.period_s", "rollout"),
        (spec(gateway={"port": 5}), "gateway.port", "rollout"),
        (spec(gateway={"http": None}), "gateway.http", "rollout"),
        (spec(tracing={"endpoint": "http://x"}), "tracing", "rollout"),
        (spec({"mesh": {"tp": 2}}), "models[m].mesh.tp", "rollout"),
        (spec({"dtype": "float32"}), "models[m].dtype", "rollout"),
        (spec(admin={"port": 5}), "admin.port", "up"),
        (spec(ray={"address": "h:1"}), "ray.address", "up"),
    ],
)
def test_each_field_has_its_command(new: DeploymentSpec, field: str, applied_by: str) -> None:
    (found,) = diff(OLD, new)
    assert (found.field, found.applied_by) == (field, applied_by)
    if applied_by == "reload":
        refuse([found], "reload")
        return
    with pytest.raises(
        SpecError, match="rollout SPEC" if applied_by == "rollout" else "arriero down"
    ):
        refuse([found], "reload")
    if applied_by == "rollout":
        refuse([found], "rollout")


def test_what_is_the_same_costs_nothing() -> None:
    assert diff(OLD, spec()) == []
    joined = spec(ray={"address": "h:1"})
    assert diff(joined, OLD) == []  # a flag of `up`, which the file does not hold


def test_models_come_and_go_by_rollout() -> None:
    other = DeploymentSpec.model_validate({"models": [{"name": "n", "path": "/m"}]})
    changes = diff(OLD, other)
    assert [one.words for one in changes] == ["models[m]: /m -> none", "models[n]: none -> /m"]
    refuse(changes, "rollout")
    with pytest.raises(SpecError, match="rollout SPEC"):
        refuse(changes, "reload")


def test_a_change_has_both_values() -> None:
    (mesh,) = diff(OLD, spec({"mesh": {"tp": 2}}))
    (http,) = diff(OLD, spec(gateway={"http": None}))
    assert mesh.words == "models[m].mesh.tp: 1 -> 2"
    assert http.words.endswith("-> null")


def test_live_settings_survive_the_registrys_store() -> None:
    wanted = spec(gateway={"tenants": [{"name": "anyone", "weight": 2}]}, health={"step_s": 7})
    live = live_settings(wanted, 3)
    assert wire.from_builtins(json.loads(json.dumps(wire.to_builtins(live))), LiveSettings) == live
    assert (live.version, live.tenants[0].weight, live.health.step_s) == (3, 2.0, 7.0)
