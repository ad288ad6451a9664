"""KubeRay manifests of the deployments that this project is built for, made from the planner.

    python infra/kuberay/generate.py           writes one file for each deployment beside itself
    python infra/kuberay/generate.py --check   exits 1 if a file is not what it would write

GPUs, pods and memory are the planner's numbers, so a manifest cannot ask for less than the model
takes. Knows KubeRay's `ray.io/v1` RayService (https://docs.ray.io, "RayService"); places nothing.
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
from arriero.cluster.planner.rank_weights import Dtype, weights_as
from arriero.shards.config.parallel import ParallelConfig

HERE = Path(__file__).parent
IMAGE = "arriero:cuda"
RAY_VERSION = "2.60.0"
MODELS_CLAIM = "arriero-models"
SPARE_GIB = 48
"""Memory of a pod beside the checkpoint's share of its node: processes, object store, staging."""
SHM_GIB = 32
CPUS_PER_GPU = 8
CONTEXT = 32_768


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """One deployment.

    Attributes:
        name: of the service and the file.
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
    """The deployment spec that the pods are given."""
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
    return {
        "models": [model],
        "gateway": {
            "host": "0.0.0.0",
            "port": 50051,
            "http": {"host": "0.0.0.0", "port": 8080},
            "count": deployment.nodes + 1,  # one in each pod, since the Service selects them all
        },
        "health": {"start_timeout_s": 3600, "drain_s": 300},
        "ray": {"address": "auto"},
    }


def manifest(deployment: Deployment) -> list[dict[str, Any]]:
    """ConfigMap, RayService and Service of one deployment."""
    made = plan(deployment)
    labels = {"app.kubernetes.io/name": "arriero", "app.kubernetes.io/instance": deployment.name}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{deployment.name}-spec", "labels": labels},
        "data": {"arriero.yaml": yaml.safe_dump(spec(deployment, made), sort_keys=False)},
    }
    application = {
        "name": "arriero",
        "import_path": "arriero.cluster.app:application",
        "route_prefix": "/",
        "args": {"spec": "/etc/arriero/arriero.yaml"},
    }
    serve_config = {"proxy_location": "HeadOnly", "applications": [application]}
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": deployment.name, "labels": labels},
        "spec": {
            # a new cluster beside the old one would need all the GPUs twice
            "upgradeStrategy": {"type": "None"},
            "serveConfigV2": yaml.safe_dump(serve_config, sort_keys=False),
            "rayClusterConfig": {
                "rayVersion": RAY_VERSION,
                "headGroupSpec": {
                    "rayStartParams": {"num-gpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": _head(deployment, labels),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": deployment.gpu,
                        "replicas": deployment.nodes,
                        "minReplicas": deployment.nodes,
                        "maxReplicas": deployment.nodes,
                        "rayStartParams": {"num-gpus": "8"},
                        "template": _worker(deployment, made, labels),
                    }
                ],
            },
        },
    }
    front = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{deployment.name}-gateway", "labels": labels},
        "spec": {
            "selector": labels,
            "ports": [
                {"name": "grpc", "port": 50051, "targetPort": 50051},
                {"name": "http", "port": 8080, "targetPort": 8080},
            ],
        },
    }
    return [config, service, front]


def _head(deployment: Deployment, labels: dict[str, str]) -> dict[str, Any]:
    resources = {"cpu": "8", "memory": "32Gi"}
    return {
        "metadata": {"labels": labels},
        "spec": {
            "containers": [_container("ray-head", resources)],
            "volumes": _volumes(deployment),
        },
    }


def _worker(deployment: Deployment, made: GroupPlan, labels: dict[str, str]) -> dict[str, Any]:
    resources = {
        "cpu": str(8 * CPUS_PER_GPU),
        "memory": f"{pod_memory_gib(made, deployment.nodes)}Gi",
        "nvidia.com/gpu": "8",
    }
    container = _container("ray-worker", resources)
    container["env"] = [
        {"name": "NCCL_SOCKET_IFNAME", "value": "eth0"},
        {"name": "GLOO_SOCKET_IFNAME", "value": "eth0"},
    ]
    return {
        "metadata": {"labels": labels},
        "spec": {
            "nodeSelector": {"nvidia.com/gpu.product": deployment.product},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "terminationGracePeriodSeconds": 330,  # a group drains for up to 300
            "containers": [container],
            "volumes": _volumes(deployment),
        },
    }


def _container(name: str, resources: dict[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "image": IMAGE,
        "resources": {"requests": resources, "limits": resources},
        "ports": [
            {"name": "arriero-grpc", "containerPort": 50051},
            {"name": "arriero-http", "containerPort": 8080},
        ],
        "volumeMounts": [
            {"name": "spec", "mountPath": "/etc/arriero"},
            {"name": "models", "mountPath": "/models", "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _volumes(deployment: Deployment) -> list[dict[str, Any]]:
    return [
        {"name": "spec", "configMap": {"name": f"{deployment.name}-spec"}},
        {"name": "models", "persistentVolumeClaim": {"claimName": MODELS_CLAIM}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHM_GIB}Gi"}},
    ]


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _string)


def text(deployment: Deployment) -> str:
    """The manifest's file."""
    head = "# Made by infra/kuberay/generate.py from the planner's numbers; do not edit.\n"
    documents = manifest(deployment)
    return head + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)


def main() -> int:
    """Write or check the files."""
    stale = []
    for deployment in DEPLOYMENTS:
        file = HERE / f"{deployment.name}.yaml"
        if "--check" not in sys.argv:
            file.write_text(text(deployment))
        elif not file.exists() or file.read_text() != text(deployment):
            stale.append(file.name)
    if stale:
        print(f"not what the planner says now: {', '.join(stale)}; run {Path(__file__).name}")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
