"""Room of the cluster for groups, and the resources that a group's slices take.

Knows Ray's resources and the spec; knows nothing of Serve and of groups that exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.label_selector import node_matches
from arriero.cluster.spec.model import ModelSpec
from arriero.cluster.spec.safety import PromptGuardSpec
from arriero.shards.errors import SpecError

SERVICE_CPUS = 0.01
"""Logical CPUs of a leader or a gateway. Both run on cores that the slices leave free."""
_LEAST_CPUS = 0.001
"""Least logical CPUs of a slice; a share of 0 would have no limit on the number of groups."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterCapacity:
    """Resources of the cluster for groups.

    Attributes:
        num_cpus: logical CPUs of the whole cluster.
        num_gpus: GPUs of the whole cluster.
        cpus_per_slice: logical CPUs of a slice whose model sets no `cpus_per_slice`.
        nodes: all resources of each node that is alive, free or not.
        node_ids: Ray's ids of these nodes; empty where they do not matter.
        node_labels: labels of these nodes; empty where they are not known.
        prompt_guard: Prompt Guard's processes, which take CPUs beside the groups; None for none.
    """

    num_cpus: float
    num_gpus: float
    cpus_per_slice: float
    nodes: tuple[Mapping[str, float], ...] = ()
    node_ids: tuple[str, ...] = ()
    node_labels: tuple[Mapping[str, str], ...] = ()
    prompt_guard: PromptGuardSpec | None = None

    @classmethod
    def of_cluster(cls, spec: DeploymentSpec, *, shared: bool) -> ClusterCapacity:
        """The capacity that Ray reports.

        Args:
            spec: the deployment.
            shared: other applications use the cluster too; then a slice takes 1 CPU by default.
                Otherwise all slices, and the extra group of a rolling update, share the CPUs.
        """
        import ray  # here, so that `up` can check a spec before it imports Ray

        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        capacity = cls.of_nodes(spec, [node["Resources"] for node in alive], shared=shared)
        return replace(
            capacity,
            node_ids=tuple(node["NodeID"] for node in alive),
            node_labels=tuple(node.get("Labels") or {} for node in alive),
        )

    @classmethod
    def of_nodes(
        cls, spec: DeploymentSpec, nodes: Sequence[Mapping[str, float]], *, shared: bool
    ) -> ClusterCapacity:
        """The capacity of nodes with these resources; for the arguments see `of_cluster`."""
        num_cpus = sum(node.get("CPU", 0.0) for node in nodes)
        surge = max(model.mesh.num_slices for model in spec.models)
        num_services = sum(model.most_seats for model in spec.models) + spec.gateway.count + 1
        prompt_guard = spec.gateway.prompt_guard
        slice_cpus = num_cpus - _cpus(prompt_guard) - SERVICE_CPUS * num_services
        share = max(_LEAST_CPUS, int(slice_cpus / (spec.num_slices + surge) * 1e3) / 1e3)
        return cls(
            num_cpus=num_cpus,
            num_gpus=sum(node.get("GPU", 0.0) for node in nodes),
            cpus_per_slice=1.0 if shared else min(1.0, share),
            nodes=tuple(nodes),
            prompt_guard=prompt_guard,
        )

    @property
    def prompt_guard_cpus(self) -> float:
        """Logical CPUs of all processes of Prompt Guard."""
        return _cpus(self.prompt_guard)

    def without(self, node_ids: Sequence[str]) -> ClusterCapacity:
        """The capacity for groups when some nodes take none; a slice keeps its share of CPUs."""
        return self._nodes([i for i, name in enumerate(self.node_ids) if name not in node_ids])

    def labelled(self, model: ModelSpec) -> ClusterCapacity:
        """The capacity of the nodes with the labels that a model's slices need."""
        selectors = model.placement.labels
        if not selectors or not self.node_labels:
            return self
        return self._nodes(
            [i for i, labels in enumerate(self.node_labels) if node_matches(selectors, labels)]
        )

    def _nodes(self, indices: Sequence[int]) -> ClusterCapacity:
        """The capacity of some of the nodes; a slice keeps its share of CPUs."""
        return replace(
            self,
            nodes=tuple(self.nodes[i] for i in indices),
            node_ids=tuple(self.node_ids[i] for i in indices) if self.node_ids else (),
            node_labels=tuple(self.node_labels[i] for i in indices) if self.node_labels else (),
        )

    def device(self, model: ModelSpec) -> str:
        """The device of a model's slices, "cpu" or "cuda"; "auto" is "cuda" with enough GPUs."""
        if model.device != "auto":
            return model.device
        return "cuda" if self.num_gpus >= _num_slices(model) else "cpu"

    def check_gpus(self, model: ModelSpec) -> None:
        """Refuse a model for which the cluster lacks GPUs.

        Raises:
            SpecError: names the model, the GPUs that it needs, and a remedy.
        """
        num_slices = _num_slices(model)
        if model.device == "cuda" and self.num_gpus < num_slices:
            raise SpecError(
                f"model `{model.name}`: {num_slices} slices need a GPU each, but the cluster has"
                f" {self.num_gpus:g}; lower `groups`, `spares` or `mesh`, or set `device: cpu`"
            )

    def bundles(self, model: ModelSpec) -> list[dict[str, float]]:
        """Resources of the bundles of a group, without the leader's small bundle."""
        cpus = model.cpus_per_slice or self.cpus_per_slice
        return PlacementBundles.of(model).bundles(cpus, self.device(model))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementBundles:
    """Placement bundles of a group's slices; all slices of a bundle run on the same node.

    Attributes:
        slices_per_bundle: the tensor-parallel slices of a stage; 1 if a stage may span nodes.
        count: number of bundles.
        accelerator: GPU type of each bundle; "" for any type.
        selector: labels that the nodes must have.
    """

    slices_per_bundle: int
    count: int
    accelerator: str
    selector: Mapping[str, str]

    @classmethod
    def of(cls, model: ModelSpec) -> PlacementBundles:
        """The bundles of a model's mesh and placement."""
        slices_per_bundle = 1 if model.placement.span else model.mesh.tp
        return cls(
            slices_per_bundle=slices_per_bundle,
            count=model.mesh.num_slices // slices_per_bundle,
            accelerator=model.placement.accelerator or "",
            selector=model.placement.labels,
        )

    def bundles(self, cpus: float, device: str) -> list[dict[str, float]]:
        """Resources of each bundle.

        Args:
            cpus: logical CPUs of a slice.
            device: "cpu" or "cuda".
        """
        bundle = {"CPU": cpus * self.slices_per_bundle}
        if device == "cuda":
            bundle["GPU"] = float(self.slices_per_bundle)
        if self.accelerator:
            bundle[f"accelerator_type:{self.accelerator}"] = 0.001
        return [bundle] * self.count

    def labels(self, avoid: Sequence[str] = ()) -> dict[str, Any]:
        """Serve's argument for node labels: an entry for the leader, then an entry per bundle.

        Args:
            avoid: ids of nodes on which no slice may start.
        """
        selector = dict(self.selector)
        if avoid:
            selector["ray.io/node-id"] = f"!in({','.join(avoid)})"
        if not selector:
            return {}
        selectors = [selector] * (1 + self.count)
        return {"placement_group_bundle_label_selector": selectors}


def _cpus(prompt_guard: PromptGuardSpec | None) -> float:
    return 0.0 if prompt_guard is None else prompt_guard.all_cpus


def _num_slices(model: ModelSpec) -> int:
    """Slices of all groups of a model, spare groups included."""
    return model.mesh.num_slices * (model.groups + model.spares)
