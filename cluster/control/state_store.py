"""The desired state of the deployment, in Ray's key-value store and as checked settings.

Knows the stored state, the spec and the capacity of the cluster; knows nothing of changes and of
the current state.
"""

from __future__ import annotations

from typing import Any

from arriero.cluster.control.admin_roles import AdminToken, AdminTokens
from arriero.cluster.control.desired_state import OperatorState
from arriero.cluster.hosts import kv_store
from arriero.cluster.hosts.capacity import ClusterCapacity
from arriero.cluster.planner.capacity_check import WantedGroups
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.model import ModelSpec

NAME = "operator"
"""Name of the value in the key-value store."""


class StateStore:
    """The desired state; `save` after each change.

    Args:
        spec: a `DeploymentSpec` as JSON, for the first start; after a restart the stored spec
            counts.
        shared: other applications use the Ray cluster too.
        token: admin token of `arriero up`, for the first start.

    Attributes:
        state: to read and to change.
        spec: current spec of the deployment.
        capacity: of the cluster, for the spec.
        admin_tokens: the tokens that Admin accepts.
    """

    def __init__(self, spec: dict[str, Any], shared: bool, token: AdminToken) -> None:
        stored = kv_store.get(NAME, OperatorState)
        self.state = OperatorState(spec, shared) if stored is None else stored
        self.admin_tokens = AdminTokens.stored(token)
        self.spec = DeploymentSpec.model_validate(self.state.spec)
        self.capacity = self.read_capacity(self.spec)

    def set_spec(self, spec: DeploymentSpec) -> None:
        """Replace the spec."""
        self.spec = spec
        self.state.spec = spec.model_dump(mode="json")
        self.capacity = self.read_capacity(spec)

    def settings(self, model: str) -> ModelSpec:
        """The settings of a model's current revision."""
        return ModelSpec.model_validate(self.state.model(model).current.settings)

    def current_settings(self) -> list[ModelSpec]:
        """The settings of the current revision of each model."""
        return [self.settings(name) for name in self.state.models]

    def wanted_groups(self) -> list[WantedGroups]:
        """The groups of all models that should run now."""
        return [
            WantedGroups.of(self.settings(name), model.count, self.capacity)
            for name, model in self.state.models.items()
        ]

    def save(self) -> None:
        """Store the state, so that it outlives the operator's process."""
        kv_store.put(NAME, self.state)

    def read_capacity(self, spec: DeploymentSpec) -> ClusterCapacity:
        """The capacity of the cluster at this moment, for a spec; drained nodes do not count."""
        capacity = ClusterCapacity.of_cluster(spec, shared=self.state.shared)
        drained = self.state.drained_nodes
        return capacity.without(drained) if drained else capacity
