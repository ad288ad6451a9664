"""The files of `infra/`: they parse, name what exists, and say what the planner says."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from arriero.cluster.planner.memory import GroupPlan, plan_group
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.router.backend import GroupLoad, GroupView
from arriero.router.observability.metrics import Metrics
from arriero.router.tls import LINK_NAME, TlsFiles
from arriero.shards.config.group import GroupConfig
from arriero.shards.layout.resolve import resolve

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"


def generator() -> ModuleType:
    found = importlib.util.spec_from_file_location("generate", INFRA / "kuberay/generate.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["generate"] = module
    found.loader.exec_module(module)
    return module


GENERATE = generator()

# Fields of KubeRay's ray.io/v1, as its API reference documents them (those that are used here).
RAY_SERVICE = {"upgradeStrategy", "serveConfigV2", "rayClusterConfig"}
RAY_CLUSTER = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD_GROUP = {"rayStartParams", "template"}
WORKER_GROUP = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"
}  # fmt: skip
RAY_START = {"num-gpus", "num-cpus", "dashboard-host", "port", "block"}
UPGRADES = {"None", "NewCluster", "NewClusterWithIncrementalUpgrade"}


@pytest.mark.parametrize("deployment", GENERATE.DEPLOYMENTS, ids=lambda one: one.name)
def test_a_manifest_is_the_planners(deployment: Any) -> None:  # noqa: ANN401
    file = INFRA / "kuberay" / f"{deployment.name}.yaml"
    assert file.read_text() == GENERATE.text(deployment), "run infra/kuberay/generate.py"
    config, service, front = yaml.safe_load_all(file.read_text())
    plan: GroupPlan = GENERATE.plan(deployment)

    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) <= RAY_SERVICE
    assert service["spec"]["upgradeStrategy"]["type"] in UPGRADES
    cluster = service["spec"]["rayClusterConfig"]
    assert set(cluster) <= RAY_CLUSTER
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
    (workers,) = cluster["workerGroupSpecs"]
    assert set(workers) <= WORKER_GROUP
    for group in (cluster["headGroupSpec"], workers):
        assert set(group["rayStartParams"]) <= RAY_START
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())

    (container,) = workers["template"]["spec"]["containers"]
    resources = container["resources"]["limits"]
    gpus = int(resources["nvidia.com/gpu"]) * workers["replicas"]
    assert gpus == len(plan.ranks) == int(workers["rayStartParams"]["num-gpus"]) * deployment.nodes
    per_pod = len(plan.ranks) // workers["replicas"]
    for pod in range(workers["replicas"]):
        ranks = plan.ranks[pod * per_pod : (pod + 1) * per_pod]
        weights = sum(rank.weights.total for rank in ranks)
        assert int(resources["memory"].removesuffix("Gi")) << 30 > weights
    product = workers["template"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"]
    assert deployment.gpu.split("-")[0].upper() in product

    spec = DeploymentSpec.model_validate(yaml.safe_load(config["data"]["arriero.yaml"]))
    (model,) = spec.models
    assert model.mesh.tp * model.mesh.pp * model.groups == gpus
    assert (model.kv.blocks, model.kv.local_blocks or 0) == plan.kv_blocks()
    assert model.cpus_per_slice is not None
    assert model.cpus_per_slice * per_pod < float(resources["cpu"])
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (ROOT / "cluster" / f"{module.rpartition('.')[2]}.py").exists() and name == "application"
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert application["args"]["spec"] == f"{mounts['spec']}/arriero.yaml"
    assert str(model.path).startswith(mounts["models"])
    volumes = {one["name"] for one in workers["template"]["spec"]["volumes"]}
    assert set(mounts) == volumes
    ports = {one["targetPort"] for one in front["spec"]["ports"]}
    assert ports == {spec.gateway.port, spec.gateway.http_port}
    assert front["spec"]["selector"].items() <= workers["template"]["metadata"]["labels"].items()


def as_served(plan: GroupPlan, group: GroupConfig) -> GroupPlan:
    """The plan of what the engine will allocate, once it has resolved the spec."""
    group = resolve(group, plan.model.config)
    demand = replace(
        plan.demand,
        num_blocks=group.num_blocks,
        num_local_blocks=group.num_local_blocks,
        max_sequences=group.max_sequences,
        max_batch_tokens=group.max_batch_tokens,
    )
    return plan_group(plan.model, plan.weights, plan.layout, demand, plan.device, plan.kernels)


def spec_of(deployment: Any) -> DeploymentSpec:  # noqa: ANN401
    config, *_ = yaml.safe_load_all((INFRA / f"kuberay/{deployment.name}.yaml").read_text())
    return DeploymentSpec.model_validate(yaml.safe_load(config["data"]["arriero.yaml"]))


@pytest.mark.parametrize("deployment", GENERATE.DEPLOYMENTS, ids=lambda one: one.name)
def test_what_a_manifest_asks_for_fits_every_rank(deployment: Any) -> None:  # noqa: ANN401
    plan: GroupPlan = GENERATE.plan(deployment)
    group = spec_of(deployment).models[0].group_config("cuda")
    served = as_served(plan, group)
    assert served.shortfall() is None
    unused = min(rank.unused for rank in served.ranks)
    assert 0 <= unused < 1 << 20, "the fullest rank's memory is all for KV blocks"


@pytest.mark.parametrize("name", ["maverick-fp8-8xh200", "maverick-bf16-16xh100"])
def test_one_pool_of_all_memory_leaves_none_for_the_other(name: str) -> None:
    """All memory as `blocks`: the engine adds blocks for chunk-local layers, and runs out."""
    (deployment,) = (one for one in GENERATE.DEPLOYMENTS if one.name == name)
    plan: GroupPlan = GENERATE.plan(deployment)
    group = spec_of(deployment).models[0].group_config("cuda")
    all_of_it = plan.pool_tokens // plan.demand.block_size
    served = as_served(plan, replace(group, num_blocks=all_of_it, num_local_blocks=None))
    assert served.missing_bytes() > 19e9


def test_a_deployment_that_does_not_fit_is_refused() -> None:
    small = replace(GENERATE.DEPLOYMENTS[0], nodes=1, layout=GENERATE.ParallelConfig(tp=8, pp=1))
    with pytest.raises(ValueError, match="does not fit"):
        GENERATE.plan(small)


def test_every_overlay_names_files_that_exist() -> None:
    found = sorted((INFRA / "kustomize").rglob("kustomization.yaml"))
    assert len(found) == 1 + len(GENERATE.DEPLOYMENTS)
    for file in found:
        kustomization = yaml.safe_load(file.read_text())
        assert kustomization["kind"] == "Kustomization"
        for resource in kustomization["resources"]:
            assert (file.parent / resource).exists(), f"{file}: {resource}"


def exported() -> set[str]:
    """The names that a gateway exports, with every kind of thing counted once."""
    view = GroupView(
        group_id="g",
        model="m",
        card=None,  # type: ignore[arg-type]
        load=GroupLoad(),
        stats={"step_us": {"wait": 1.0}, "expert_loads": {"0": [1, 2]}, "expert_imbalance": 1.5},
    )
    metrics = Metrics(lambda: [view], lambda: {("m", "t"): 1})
    with metrics.request("m", "t"):
        metrics.migrated("m", 1)
    with pytest.raises(Exception, match="x"), metrics.failures():
        raise RuntimeError("x")
    text = metrics.export().decode()
    return set(re.findall(r"^(arriero_\w+)", text, re.MULTILINE))


def expressions() -> Iterator[tuple[str, str]]:
    rules = yaml.safe_load((INFRA / "prometheus/rules.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for file in sorted((INFRA / "grafana").glob("*.json")):
        board = json.loads(file.read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                yield f"{file.name}: {panel['title']}", target["expr"]
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{file.name}: {variable['name']}", variable["query"]


def test_rules_and_dashboards_name_metrics_that_are_exported() -> None:
    names = exported()
    for where, expression in expressions():
        used = set(re.findall(r"arriero_\w+", expression))
        assert used and used <= names, f"{where}: {used - names}"
        assert expression.count("(") == expression.count(")"), where


def test_every_metric_is_shown_or_watched() -> None:
    shown = {
        name for _, expression in expressions() for name in re.findall(r"arriero_\w+", expression)
    }
    families = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in exported()}
    used = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in shown}
    assert families == used


def test_every_alert_has_an_entry_in_the_runbook() -> None:
    headings = re.findall(r"^## (\w+)$", (INFRA / "runbook.md").read_text(), re.MULTILINE)
    rules = yaml.safe_load((INFRA / "prometheus/rules.yaml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    assert [rule["alert"] for rule in alerts] == headings
    for rule in alerts:
        assert rule["annotations"]["runbook"] == f"infra/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "warn")


def test_the_runbook_names_commands_that_exist() -> None:
    from arriero.cluster.cli import app

    names = {one.name or one.callback.__name__ for one in app.registered_commands if one.callback}
    for file in (INFRA / "runbook.md", INFRA / "README.md"):
        used = set(re.findall(r"(?:^|`)arriero ([a-z]+)", file.read_text(), re.MULTILINE))
        assert used - {"plan"} <= names, used - names


def test_links_lead_somewhere() -> None:
    for file in INFRA.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text()):
            assert (file.parent / link).exists(), f"{file}: {link}"


@pytest.mark.parametrize("script", sorted(INFRA.rglob("*.sh")), ids=lambda one: one.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o100


@pytest.mark.parametrize("script", ["head.sh", "worker.sh"])
def test_metal_scripts_say_what_they_need(script: str) -> None:
    said = subprocess.run(
        [str(INFRA / "metal" / script)],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert said.returncode != 0 and "give" in said.stderr


def test_units_run_scripts_that_exist() -> None:
    for unit in (INFRA / "metal").glob("*.service"):
        text = unit.read_text()
        (start,) = re.findall(r"^ExecStart=/opt/arriero/(.+)$", text, re.MULTILINE)
        assert (ROOT / start).exists()
        assert {"[Unit]", "[Service]", "[Install]"} <= set(text.splitlines())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_certificates_are_believed(tmp_path: Path) -> None:
    made = [str(INFRA / "tls/make-certs.sh"), str(tmp_path), "gateway.example", "127.0.0.1"]
    subprocess.run(made, check=True, capture_output=True)
    subprocess.run(made, check=True, capture_output=True)  # again, under the same authority
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "gateway.pem", tmp_path / "gateway.key")
    checked = subprocess.run(
        ["openssl", "verify", "-CAfile", "ca.pem", "-verify_hostname", "gateway.example",
         "gateway.pem"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert (tmp_path / "gateway.key").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_a_links_certificate_is_believed_at_both_ends(tmp_path: Path) -> None:
    script = str(INFRA / "tls/make-certs.sh")
    environment = os.environ | {"FILE": "link"}
    subprocess.run([script, str(tmp_path), LINK_NAME], env=environment, check=True,
                   capture_output=True)  # fmt: skip
    files = TlsFiles(
        certificate=tmp_path / "link.pem", key=tmp_path / "link.key", ca=tmp_path / "ca.pem"
    )
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = files.link_server("link_tls").wrap_bio(ours, theirs, server_side=True)
    client = files.link_client("link_tls").wrap_bio(theirs, ours, server_hostname=LINK_NAME)
    for _ in range(4):
        for end in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert client.getpeercert() and server.getpeercert()


def test_the_dockerfile_copies_what_exists() -> None:
    text = (INFRA / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert (ROOT / line).exists()
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
    assert stages == ["build", "cpu", "cuda"]


def test_every_network_setting_has_a_value_and_a_reason() -> None:
    rows = re.findall(
        r"^\| `(.+?)` \| (.+?) \| (.+?) \|$",
        (INFRA / "nccl/README.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) >= 8
    for names, value, why in rows:
        assert all(re.fullmatch(r"[A-Z][A-Z0-9_]+", one) for one in names.split("`, `")), names
        assert value and len(why.split()) > 5, names
    told = {one for names, _, _ in rows for one in names.split("`, `")}
    used = set()
    for file in [*(INFRA / "kuberay").glob("*.yaml"), *(INFRA / "metal").glob("*.sh")]:
        used |= set(re.findall(r"\b((?:NCCL|GLOO|TORCH_NCCL)_[A-Z_]+)\b", file.read_text()))
    assert used and used <= told, used - told


def test_units_say_what_a_node_needs() -> None:
    for unit in (INFRA / "metal").glob("*.service"):
        found = configparser.ConfigParser(strict=False, interpolation=None)
        found.optionxform = str  # type: ignore[assignment,method-assign]
        found.read_string(unit.read_text())
        service = found["Service"]
        assert service["Restart"] == "always" and service["LimitMEMLOCK"] == "infinity"
        assert int(service["LimitNOFILE"]) >= 65_536
        # longer than groups drain, or systemd kills what still hands over
        assert int(service["TimeoutStopSec"]) > 300
