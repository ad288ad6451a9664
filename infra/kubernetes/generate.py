"""Kustomize overlays of the deployments that this project is built for, made from the planner.

    python infra/kubernetes/generate.py           writes overlays/ and the alerts of monitoring
    python infra/kubernetes/generate.py --check   exits 1 if a file is not what it would write

GPUs, pods and memory are the planner's numbers, so an overlay cannot ask for less than the model
takes. Knows the paths of base/raycluster.yaml that a size changes; places nothing.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from arriero.cluster.planner.catalog import find_model
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.layouts import Machines
from arriero.cluster.planner.memory import GroupPlan, plan_group
from arriero.cluster.planner.weight_forms import Dtype, weights_as
from arriero.shards.config.parallel import ParallelConfig

HERE = Path(__file__).parent
TLS = "/etc/arriero/tls"
FRONT_PODS = 2
SPARE_GIB = 48
"""Memory of a pod beside the checkpoint's share of its node: processes, object store, staging."""
SHM_GIB = 32
CPUS_PER_GPU = 8
CONTEXT = 32_768


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """One deployment.

    Attributes:
        name: of the overlay.
        model: in the planner's catalogue.
        served: what clients call it.
        dtype: as the planner's.
        gpu: in the planner's catalogue.
        product: the node label that the device plugin gives such a GPU.
        nodes: pods of a group, each a whole machine of eight.
        layout: of the group.
        quantization: in the spec; None where the checkpoint is kept as it is.
    """

    name: str
    model: str
    served: str
    dtype: Dtype
    gpu: str
    product: str
    nodes: int
    layout: ParallelConfig
    quantization: str | None = None


H100, H200 = "NVIDIA-H100-80GB-HBM3", "NVIDIA-H200"
DEPLOYMENTS = (
    Deployment(
        name="llama-405b-bf16-16xh100", model="llama-3.1-405b", served="llama-3.1-405b",
        dtype="bfloat16", gpu="h100-80g", product=H100, nodes=2, layout=ParallelConfig(tp=8, pp=2),
    ),
    Deployment(
        name="llama-405b-fp8-8xh200", model="llama-3.1-405b", served="llama-3.1-405b-fp8",
        dtype="fp8-shipped", gpu="h200-141g", product=H200, nodes=1,
        layout=ParallelConfig(tp=8, pp=1),
    ),
    Deployment(
        name="maverick-fp8-8xh200", model="llama-4-maverick", served="llama-4-maverick-fp8",
        dtype="fp8-shipped", gpu="h200-141g", product=H200, nodes=1,
        layout=ParallelConfig(tp=8, pp=1, ep=8),
    ),
    Deployment(
        name="maverick-bf16-16xh100", model="llama-4-maverick", served="llama-4-maverick",
        dtype="bfloat16", gpu="h100-80g", product=H100, nodes=2,
        layout=ParallelConfig(tp=8, pp=2, ep=8),
    ),
)  # fmt: skip


def plan(deployment: Deployment) -> GroupPlan:
    """The planner's numbers for one group.

    Raises:
        ValueError: it does not fit.
    """
    model = find_model(deployment.model)
    weights = weights_as(model.config, model.scheme, deployment.dtype)
    machines = Machines(gpu=deployment.gpu, nodes=deployment.nodes, per_node=8, memory_bytes=None)
    demand = KvDemand(context=CONTEXT, kv_dtype="bfloat16")
    made = plan_group(model, weights, deployment.layout, demand, machines.device(), "triton")
    if (why := made.shortfall()) is not None:
        raise ValueError(f"{deployment.name} does not fit: {why}")
    return made


def pools(made: GroupPlan) -> dict[str, int]:
    """Sizes of the KV pools, as the engine divides what the weights leave."""
    blocks, local_blocks = made.kv_blocks()
    return {"blocks": blocks} | ({"local_blocks": local_blocks} if made.chunk else {})


def pod_memory_gib(made: GroupPlan, nodes: int) -> int:
    """Memory of a worker's pod: its node's share of the weights stays in the page cache."""
    per_node = len(made.ranks) // nodes
    parts = [
        sum(rank.weights.total for rank in made.ranks[at : at + per_node])
        for at in range(0, len(made.ranks), per_node)
    ]
    return math.ceil(max(parts) / 2**30) + SPARE_GIB + SHM_GIB


def spec(deployment: Deployment, made: GroupPlan) -> dict[str, Any]:
    """The deployment spec of the overlay; what the pods mount is in base/raycluster.yaml."""
    model: dict[str, Any] = {
        "name": deployment.served,
        "path": f"/models/{deployment.served}",
        "dtype": "bfloat16",
        "device": "cuda",
        "mesh": {"tp": deployment.layout.tp, "pp": deployment.layout.pp},
        "kv": pools(made),
        "limits": {"max_model_len": CONTEXT},
        "cpus_per_slice": CPUS_PER_GPU - 1,
    }
    if deployment.quantization is not None:
        model["quantization"] = deployment.quantization
    authority = f"{TLS}/ca.pem"
    return {
        "models": [model],
        "gateway": {
            "host": "0.0.0.0",
            "port": 50051,
            "http": {"host": "0.0.0.0", "port": 8000},  # KubeRay takes 8080 for Ray's metrics
            "count": deployment.nodes + FRONT_PODS,  # one in each pod of the Service
            "tls": _certificate("gateway"),
            "keys": "/etc/arriero/keys/keys.yaml",
            "tenants": [{"name": "metrics", "metrics": True}],
        },
        "admin": {
            "host": "0.0.0.0",
            "port": 50052,
            "tls": {**_certificate("admin"), "ca": authority, "name": "arriero-admin"},
        },
        "link_tls": {**_certificate("link"), "ca": authority},
        "health": {"start_timeout_s": 3600, "drain_s": 300},
    }


def _certificate(name: str) -> dict[str, str]:
    return {"certificate": f"{TLS}/{name}.pem", "key": f"{TLS}/{name}.key"}


def sizes(deployment: Deployment, made: GroupPlan) -> list[dict[str, Any]]:
    """The JSON patch that gives the base's GPU pods their number, memory and node."""
    group = "/spec/workerGroupSpecs/0"
    pod = f"{group}/template/spec"
    memory = f"{pod_memory_gib(made, deployment.nodes)}Gi"
    cpu = str(8 * CPUS_PER_GPU)
    node = {"nvidia.com/gpu.product": deployment.product}
    values: dict[str, Any] = {
        f"{group}/replicas": deployment.nodes,
        f"{group}/minReplicas": deployment.nodes,
        f"{group}/maxReplicas": deployment.nodes,
        f"{pod}/nodeSelector": node,
        f"{pod}/volumes/3/emptyDir/sizeLimit": f"{SHM_GIB}Gi",
    }
    for kind in ("requests", "limits"):
        values[f"{pod}/containers/0/resources/{kind}/cpu"] = cpu
        values[f"{pod}/containers/0/resources/{kind}/memory"] = memory
    return [{"op": "replace", "path": path, "value": value} for path, value in values.items()]


def kustomization(deployment: Deployment, made: GroupPlan) -> dict[str, Any]:
    """The overlay: the base, its components, the spec and the sizes."""
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "arriero",
        "resources": ["../../base"],
        "configMapGenerator": [{"name": "arriero-spec", "files": ["arriero.yaml"]}],
        "patches": [
            {
                "target": {"kind": "RayCluster", "name": "arriero"},
                "patch": yaml.safe_dump(sizes(deployment, made), sort_keys=False),
            },
            {
                "target": {"kind": "PodDisruptionBudget", "name": "arriero-gpu"},
                "patch": yaml.safe_dump(
                    [{"op": "replace", "path": "/spec/minAvailable", "value": deployment.nodes}],
                    sort_keys=False,
                ),
            },
        ],
    }


def rules() -> dict[str, Any]:
    """The alerts as the Prometheus operator takes them."""
    groups = yaml.safe_load((HERE.parent / "prometheus/rules.yaml").read_text())
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "arriero", "labels": {"app.kubernetes.io/name": "arriero"}},
        "spec": groups,
    }


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _string)


def files() -> dict[Path, str]:
    """Every file that this script writes, with its text."""
    contents: dict[Path, Any] = {HERE / "components/monitoring/rules.yaml": rules()}
    for deployment in DEPLOYMENTS:
        made = plan(deployment)
        folder = HERE / "overlays" / deployment.name
        contents[folder / "arriero.yaml"] = spec(deployment, made)
        contents[folder / "kustomization.yaml"] = kustomization(deployment, made)
    head = "# Made by infra/kubernetes/generate.py; copy the folder to change it.\n"
    return {
        path: head + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=100)
        for path, content in contents.items()
    }


def main() -> int:
    """Write or check the files."""
    stale = []
    for path, text in files().items():
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(str(path.relative_to(HERE)))
    if stale:
        print(f"not what the planner says now: {', '.join(stale)}; run {Path(__file__).name}")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
