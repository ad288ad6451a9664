"""The safety policy of a tenant in the spec, and on its way to the gateways."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.diff import diff, live_settings
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.router.tenants.safety import SafetyPolicy
from arriero.shards.protocol import wire


def spec(gateway: dict[str, Any], **safety: Any) -> DeploymentSpec:  # noqa: ANN401
    if safety:
        gateway |= {"tenants": [{"name": "anyone", "safety": safety}]}
    models = [{"name": "llama", "path": "/m"}, {"name": "guard", "path": "/g"}]
    return DeploymentSpec.model_validate({"models": models, "gateway": gateway})


def test_a_policy_reaches_the_gateways() -> None:
    made = spec({"guard": "guard"}, guard="guard", output="cut", categories=["S1", "S10"])
    (tenant,) = made.gateway.config(("llama", "guard")).tenants
    assert tenant.safety == SafetyPolicy(
        guard="guard", output="cut", categories={"S1": "Violent Crimes", "S10": "Hate"}
    )
    assert made.gateway.config(("llama",)).guard == "guard"
    live = live_settings(made, 1)
    assert wire.decode(wire.encode(live), LiveSettings) == live
    changed = spec({"guard": "guard"}, guard="guard", input="refuse")
    assert [change.applied_by for change in diff(made, changed)] == ["reload"]


@pytest.mark.parametrize(
    ("gateway", "safety", "words"),
    [
        ({"guard": "other"}, {}, "'other' of the gateway is no model"),
        ({}, {"guard": "other"}, "'other' of the gateway is no model"),
        ({}, {"guard": "guard", "categories": ["S99"]}, "S99"),
        ({}, {"guard": "guard", "window": 0}, "window"),
        ({}, {"guard": "guard", "output": "refuse"}, "annotate"),
    ],
)
def test_refusals(gateway: dict[str, Any], safety: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        spec(dict(gateway), **safety)
