"""`infra/kubernetes`: the overlays build, say what the planner says, and fit KubeRay.

`kubectl kustomize` is the real command. Knows KubeRay's fields by a digest of its `ray.io/v1`
RayCluster (https://docs.ray.io, "RayCluster configuration"); knows nothing of a real cluster.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import os
import shutil
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
from arriero.router.tls import LINK_NAME
from arriero.shards.config.group import GroupConfig
from arriero.shards.layout.resolve import resolve

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "infra" / "kubernetes"
COMPONENTS = ("redis", "rdma", "monitoring")
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="no kubectl (Debian: kubernetes-client)"
)
Manifest = dict[str, Any]

# Fields of KubeRay 1.6's RayCluster, and of the pods in it, as far as they are used here.
CLUSTER = {"rayVersion", "upgradeStrategy", "headGroupSpec", "workerGroupSpecs"} | {
    "gcsFaultToleranceOptions"
}
HEAD_GROUP = {"rayStartParams", "template"}
WORKER_GROUP = HEAD_GROUP | {"groupName", "replicas", "minReplicas", "maxReplicas"}
POD = {
    "affinity", "automountServiceAccountToken", "containers", "nodeSelector", "securityContext",
    "terminationGracePeriodSeconds", "tolerations", "topologySpreadConstraints", "volumes",
}  # fmt: skip
CONTAINER = {
    "args", "command", "env", "image", "name", "ports", "readinessProbe", "resources",
    "securityContext", "volumeMounts",
}  # fmt: skip
ADDED_BY_KUBERAY = {
    "metrics-export-port": "8080", "dashboard-agent-listen-port": "52365", "block": "true",
}  # fmt: skip
PORTS_OF_RAY = {6379, 8080, 8265, 10001, 52365}


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", KUBERNETES / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


GENERATE = generator()
each_deployment = pytest.mark.parametrize(
    "deployment", GENERATE.DEPLOYMENTS, ids=lambda deployment: deployment.name
)


@functools.cache
def build(folder: Path) -> tuple[Manifest, ...]:
    """The manifests of an overlay, by the real `kubectl kustomize`."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def copied(folder: Path) -> Path:
    """A copy of `infra/kubernetes`, to edit."""
    shutil.copytree(KUBERNETES, folder / "kubernetes")
    return folder / "kubernetes"


def with_components(tree: Path, name: str) -> Path:
    """An overlay in a copied tree with every component, as an operator would add them."""
    file = tree / "overlays" / name / "kustomization.yaml"
    content = yaml.safe_load(file.read_text())
    content["components"] = [f"../../components/{component}" for component in COMPONENTS]
    content["images"] = [{"name": "arriero", "newName": "registry.example/arriero"}]
    file.write_text(yaml.safe_dump(content))
    return file.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, ...]:
    """The manifests of the first overlay with every component."""
    tree = copied(tmp_path_factory.mktemp("whole"))
    return build(with_components(tree, GENERATE.DEPLOYMENTS[0].name))


def only(manifests: tuple[Manifest, ...], kind: str, name: str) -> Manifest:
    (manifest,) = (
        manifest
        for manifest in manifests
        if (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)
    )
    return manifest


def pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template, with a name."""
    for manifest in manifests:
        if manifest["kind"] == "RayCluster":
            spec = manifest["spec"]
            yield "head", spec["headGroupSpec"]["template"]
            for group in spec["workerGroupSpecs"]:
                yield group["groupName"], group["template"]
        elif manifest["kind"] in ("Deployment", "StatefulSet"):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]


def spec_of(deployment: Any) -> DeploymentSpec:  # noqa: ANN401
    text = (KUBERNETES / "overlays" / deployment.name / "arriero.yaml").read_text()
    return DeploymentSpec.model_validate(yaml.safe_load(text))


# ---- the planner ----


def test_the_overlays_are_the_planners() -> None:
    for path, text in GENERATE.files().items():
        assert path.read_text() == text, f"{path}: run infra/kubernetes/generate.py"
    names = {deployment.name for deployment in GENERATE.DEPLOYMENTS}
    assert {folder.name for folder in (KUBERNETES / "overlays").iterdir()} == names


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


@each_deployment
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


@needs_kubectl
@each_deployment
def test_an_overlay_builds_and_has_the_sizes_of_the_plan(deployment: Any) -> None:  # noqa: ANN401
    manifests = build(KUBERNETES / "overlays" / deployment.name)
    assert {manifest["metadata"].get("namespace", "arriero") for manifest in manifests} == {
        "arriero"
    }
    plan: GroupPlan = GENERATE.plan(deployment)
    spec = spec_of(deployment)
    (model,) = spec.models
    gpu, front = only(manifests, "RayCluster", "arriero")["spec"]["workerGroupSpecs"]
    pod = gpu["template"]["spec"]
    (container,) = pod["containers"]
    for resources in container["resources"].values():
        assert int(resources["nvidia.com/gpu"]) * gpu["replicas"] == len(plan.ranks)
        per_pod = len(plan.ranks) // gpu["replicas"]
        for at in range(0, len(plan.ranks), per_pod):
            weights = sum(rank.weights.total for rank in plan.ranks[at : at + per_pod])
            assert int(resources["memory"].removesuffix("Gi")) << 30 > weights
        assert model.cpus_per_slice is not None
        assert model.cpus_per_slice * per_pod < float(resources["cpu"])
    assert gpu["replicas"] == gpu["minReplicas"] == gpu["maxReplicas"] == deployment.nodes
    budget = only(manifests, "PodDisruptionBudget", "arriero-gpu")
    assert budget["spec"]["minAvailable"] == deployment.nodes
    assert deployment.gpu.split("-")[0].upper() in pod["nodeSelector"]["nvidia.com/gpu.product"]
    assert model.mesh.tp * model.mesh.pp * model.groups == len(plan.ranks)
    assert (model.kv.blocks, model.kv.local_blocks or 0) == plan.kv_blocks()
    assert spec.gateway.count == gpu["replicas"] + front["replicas"], "one gateway in each pod"
    assert pod["terminationGracePeriodSeconds"] > spec.health.drain_s


# ---- Kubernetes and KubeRay ----


@needs_kubectl
def test_the_cluster_has_fields_that_kuberay_knows(whole: tuple[Manifest, ...]) -> None:
    cluster = only(whole, "RayCluster", "arriero")
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert set(spec) <= CLUSTER
    assert spec["upgradeStrategy"]["type"] in ("Recreate", "None")
    assert set(spec["headGroupSpec"]) <= HEAD_GROUP
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
    assert set(spec["gcsFaultToleranceOptions"]) == {"redisAddress", "redisPassword"}
    for name, pod in pods(whole):
        assert set(pod["spec"]) <= POD, name
        for container in pod["spec"]["containers"]:
            assert set(container) <= CONTAINER, name


@needs_kubectl
def test_start_commands_are_ray_starts(whole: tuple[Manifest, ...]) -> None:
    """The flags, with those that KubeRay adds, are flags of the `ray start` that is installed."""
    from ray.scripts.scripts import start

    flags = {flag for parameter in start.params for flag in parameter.opts}
    spec = only(whole, "RayCluster", "arriero")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        params = group["rayStartParams"]
        assert all(isinstance(value, str) for value in params.values())
        assert not set(params) & set(ADDED_BY_KUBERAY)
        assert {f"--{name}" for name in params | ADDED_BY_KUBERAY} <= flags


@needs_kubectl
def test_no_port_of_ours_is_one_of_rays(whole: tuple[Manifest, ...]) -> None:
    for deployment in GENERATE.DEPLOYMENTS:
        spec = spec_of(deployment)
        ours = {spec.gateway.port, spec.gateway.http_port, spec.admin.port}
        assert not ours & PORTS_OF_RAY and 0 not in ours
        for name, pod in pods(whole):
            for port in pod["spec"]["containers"][0].get("ports", []):
                if name in ("gpu", "front"):
                    assert port["containerPort"] in ours
        gateway = only(whole, "Service", "arriero-gateway")["spec"]
        assert {port["port"] for port in gateway["ports"]} == ours - {spec.admin.port}
        admin = only(whole, "Service", "arriero-admin")["spec"]
        assert [port["port"] for port in admin["ports"]] == [spec.admin.port]


@needs_kubectl
def test_services_and_policies_select_pods_that_exist(whole: tuple[Manifest, ...]) -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(whole)}

    def chosen(selector: dict[str, str]) -> set[str]:
        return {name for name, of_pod in labels.items() if selector.items() <= of_pod.items()}

    def service(name: str) -> set[str]:
        return chosen(only(whole, "Service", name)["spec"]["selector"])

    assert service("arriero-gateway") == {"gpu", "front"}
    assert service("arriero-admin") == {"head"}
    assert service("arriero-redis") == {"arriero-redis"}
    policies = {
        manifest["metadata"]["name"]: manifest["spec"]
        for manifest in whole
        if manifest["kind"] == "NetworkPolicy"
    }
    closed = policies.pop("arriero-closed")
    assert chosen(closed["podSelector"]["matchLabels"]) == set(labels), "every pod is closed"
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    (clients,) = policies.values()
    assert chosen(clients["podSelector"]["matchLabels"]) == {"gpu", "front"}
    (rule,) = clients["ingress"]
    spec = spec_of(GENERATE.DEPLOYMENTS[0])
    assert {port["port"] for port in rule["ports"]} == {spec.gateway.port, spec.gateway.http_port}


@needs_kubectl
def test_pods_get_no_more_rights_than_they_need(whole: tuple[Manifest, ...]) -> None:
    for name, pod in pods(whole):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"]["drop"] == ["ALL"], name


@needs_kubectl
def test_ray_asks_for_the_token_in_every_pod(whole: tuple[Manifest, ...]) -> None:
    for name, pod in pods(whole):
        if name == "arriero-redis":
            continue
        (container,) = pod["spec"]["containers"]
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token", name
        source = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert source == {"name": "arriero-ray-token", "key": "auth_token"}, name


@needs_kubectl
def test_rdma_is_asked_for_where_the_gpus_are(whole: tuple[Manifest, ...]) -> None:
    spec = only(whole, "RayCluster", "arriero")["spec"]
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        asked = "rdma/hca_shared_devices_a" in container["resources"]["limits"]
        assert asked is (group["groupName"] == "gpu")
        assert ("add" in container["securityContext"]["capabilities"]) is asked


@needs_kubectl
def test_another_image_reaches_every_pod(whole: tuple[Manifest, ...]) -> None:
    images = {name: pod["spec"]["containers"][0]["image"] for name, pod in pods(whole)}
    del images["arriero-redis"]
    assert set(images.values()) == {"registry.example/arriero:cuda"}


@needs_kubectl
def test_an_edit_of_the_spec_or_the_script_rolls_the_deployer(tmp_path: Path) -> None:
    tree = copied(tmp_path)
    overlay = tree / "overlays" / GENERATE.DEPLOYMENTS[0].name

    def template() -> tuple[Manifest, Manifest]:
        build.cache_clear()
        manifests = build(overlay)
        deployer = only(manifests, "Deployment", "arriero")["spec"]["template"]
        return deployer, only(manifests, "RayCluster", "arriero")["spec"]

    deployer, cluster = template()
    for file in (overlay / "arriero.yaml", tree / "base" / "deploy.sh"):
        file.write_text(file.read_text() + "# edited\n")
        edited, same = template()
        assert edited != deployer and same == cluster, "pods with GPUs stay"
        deployer = edited


@needs_kubectl
def test_every_mount_has_its_volume_and_every_file_its_mount(whole: tuple[Manifest, ...]) -> None:
    for name, pod in pods(whole):
        claims = {
            entry["metadata"]["name"]
            for manifest in whole
            if manifest["metadata"]["name"] == name and manifest["kind"] == "StatefulSet"
            for entry in manifest["spec"]["volumeClaimTemplates"]
        }
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]} | claims
        (container,) = pod["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes, name
        if name in ("head", "gpu", "front", "arriero"):
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/models", "/etc/arriero/tls", "/etc/arriero/keys", "/dev/shm"} <= mounts


# ---- secrets ----


@needs_kubectl
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_the_secrets_are_all_that_the_pods_name(
    tmp_path: Path, whole: tuple[Manifest, ...]
) -> None:
    folder = tmp_path / "secrets"
    scripts = tmp_path / "bin"
    scripts.mkdir()
    command = f'#!/bin/sh\nexec "{sys.executable}" -m arriero.cluster.cli "$@"\n'
    (scripts / "arriero").write_text(command)
    (scripts / "arriero").chmod(0o755)
    environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"}

    def secrets() -> dict[str, dict[str, str]]:
        done = subprocess.run(
            [str(KUBERNETES / "secrets.sh"), str(folder), "api.example"],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return {
            manifest["metadata"]["name"]: manifest["data"]
            for manifest in yaml.safe_load_all(done.stdout)
            if manifest
        }

    first = secrets()
    assert secrets() == first, "a second run changes nothing"
    assert folder.stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o077 for path in folder.glob("*.key")} == {0}
    token = base64.b64decode(first["arriero-ray-token"]["auth_token"])
    assert len(token) == 64, "without the line's end"
    text = "\n".join(yaml.safe_dump(manifest) for manifest in whole)
    for name, data in first.items():
        assert name in text, f"no pod uses {name}"
        assert data
    files = set(first["arriero-tls"])
    for deployment in GENERATE.DEPLOYMENTS:
        spec = spec_of(deployment)
        assert spec.gateway.tls is not None and spec.admin.tls is not None
        assert spec.link_tls is not None and spec.link_tls.ca is not None
        named = (
            spec.gateway.tls.certificate, spec.gateway.tls.key, spec.admin.tls.certificate,
            spec.admin.tls.key, spec.admin.tls.ca, spec.link_tls.certificate, spec.link_tls.key,
            spec.link_tls.ca,
        )  # fmt: skip
        assert {path.name for path in named} == files
    for file, host in (
        ("gateway", "arriero-gateway"), ("gateway", "api.example"),
        ("admin", "arriero-admin"), ("link", LINK_NAME),
    ):  # fmt: skip
        subprocess.run(
            ["openssl", "verify", "-CAfile", "ca.pem", "-verify_hostname", host, f"{file}.pem"],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
