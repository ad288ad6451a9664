"""The desired state of the deployment, in Ray's key-value store and as checked settings.

Knows the stored state, the spec and the capacity of the cluster; knows nothing of changes and of
the current state.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from arriero.cluster import app
from arriero.cluster.control.desired_state import OperatorState
from arriero.cluster.hosts import kv_store
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
        token: admin token, for the first start.

    Attributes:
        state: to read and to change.
        spec: current spec of the deployment.
        capacity: of the cluster, for the spec.
    """

    def __init__(self, spec: dict[str, Any], shared: bool, token: str) -> None:
        stored = kv_store.get(NAME)
        self.state = (
            OperatorState(spec, shared, token)
            if stored is None
            else OperatorState.from_wire(stored)
        )
        self.spec = DeploymentSpec.model_validate(self.state.spec)
        self.capacity = self._read_capacity()

    def set_spec(self, spec: DeploymentSpec) -> None:
        """Replace the spec."""
        self.spec = spec
        self.state.spec = spec.model_dump(mode="json")
        self.capacity = self._read_capacity()

    def settings(self, model: str) -> ModelSpec:
        """The settings of a model's current revision."""
        return ModelSpec.model_validate(self.state.model(model).current.settings)

    def save(self) -> None:
        """Store the state, so that it outlives the operator's process."""
        kv_store.put(NAME, asdict(self.state))

    def _read_capacity(self) -> app.ClusterCapacity:
        return app.ClusterCapacity.of_cluster(self.spec, shared=self.state.shared)
