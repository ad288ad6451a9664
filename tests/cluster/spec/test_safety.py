"""The safety policy of a tenant in the spec, and on its way to the gateways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from arriero.cluster import app
from arriero.cluster.hosts import node_check
from arriero.cluster.hosts.capacity import ClusterCapacity
from arriero.cluster.planner.capacity_check import refuse_spec
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.diff import diff, live_settings
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.cluster.spec.load import load
from arriero.router.tenants.safety import PromptGuardPolicy, SafetyPolicy
from arriero.shards.errors import SpecError
from arriero.shards.protocol import wire


def spec(gateway: dict[str, Any], **safety: Any) -> DeploymentSpec:  # noqa: ANN401
    if safety:
        gateway |= {"tenants": [{"name": "anyone", "safety": safety}]}
    models = [{"name": "llama", "path": "/m"}, {"name": "guard", "path": "/g"}]
    return DeploymentSpec.model_validate({"models": models, "gateway": gateway})


PROMPT_GUARD: dict[str, Any] = {"prompt_guard": {"path": "/models/prompt-guard"}}


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
        ({}, {"input": "refuse"}, "need `guard`"),
        (
            {},
            {"prompt_guard": {"input": "refuse"}},
            "tenant `anyone`: `safety.prompt_guard` without `gateway.prompt_guard`",
        ),
        (PROMPT_GUARD, {"prompt_guard": {}}, "input"),
        (PROMPT_GUARD, {"prompt_guard": {"input": "cut"}}, "refuse"),
        (PROMPT_GUARD, {"prompt_guard": {"input": "refuse", "threshold": 0}}, "threshold"),
        ({"prompt_guard": {}}, {}, "path"),
        ({"prompt_guard": {"path": "/p", "replicas": 0}}, {}, "replicas"),
    ],
)
def test_refusals(gateway: dict[str, Any], safety: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        spec(dict(gateway), **safety)


def test_prompt_guard_in_the_spec() -> None:
    made = spec(dict(PROMPT_GUARD), prompt_guard={"input": "refuse", "threshold": 0.7})
    (tenant,) = made.gateway.config(("llama",)).tenants
    assert tenant.safety == SafetyPolicy(
        prompt_guard=PromptGuardPolicy(input="refuse", threshold=0.7)
    )
    assert not made.gateway.guards, "no guard model is needed"
    live = live_settings(made, 1)
    assert wire.decode(wire.encode(live), LiveSettings) == live
    softer = spec(dict(PROMPT_GUARD), prompt_guard={"input": "annotate"})
    assert [change.applied_by for change in diff(made, softer)] == ["reload"]
    others = {"prompt_guard": PROMPT_GUARD["prompt_guard"] | {"replicas": 2}}
    more = spec(others, prompt_guard={"input": "refuse", "threshold": 0.7})
    assert [(c.field, c.applied_by) for c in diff(made, more)] == [
        ("gateway.prompt_guard.replicas", "rollout")
    ]
    # beside the gateways in their application, and nowhere else
    for settings, extra in ((made, ["prompt_guard"]), (spec({}), [])):
        bound = app.gateways(settings)._bound_deployment
        assert list(bound.init_kwargs) == extra


@pytest.mark.parametrize(("replicas", "fits"), [(2, True), (3, False)])
def test_prompt_guard_takes_cpus_from_the_groups(replicas: int, fits: bool) -> None:
    models = [{"name": "llama", "path": "/m", "device": "cpu", "cpus_per_slice": 1}]
    gateway: dict[str, Any] = {"prompt_guard": {"path": "/p", "cpus": 1, "replicas": replicas}}
    made = DeploymentSpec.model_validate({"models": models, "gateway": gateway | {"port": 0}})
    capacity = ClusterCapacity.of_nodes(made, [{"CPU": 3.5}], shared=True)
    if fits:
        refuse_spec(made, capacity)
        return
    with pytest.raises(SpecError, match=r"`replicas`=3 with `cpus`=1 .* leave 2.48 CPUs"):
        refuse_spec(made, capacity)


def test_the_folder_of_prompt_guard(tmp_path: Path) -> None:
    for name in ("model", "guard"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    gateway = {"prompt_guard": {"path": "guard"}}
    data = {"models": [{"name": "llama", "path": "model"}], "gateway": gateway}
    file = tmp_path / "arriero.yaml"
    file.write_text(json.dumps(data))
    with pytest.raises(SpecError, match=r"`gateway.prompt_guard.path`: .*/guard has no config"):
        load(file, {})
    with pytest.raises(SpecError, match="copy the folder to every node"):
        node_check.check_prompt_guard(tmp_path / "guard")
    (tmp_path / "guard" / "config.json").write_text("{}")
    prompt_guard = load(file, {}).gateway.prompt_guard
    assert prompt_guard is not None and prompt_guard.path == tmp_path / "guard"
    node_check.check_prompt_guard(prompt_guard.path)
