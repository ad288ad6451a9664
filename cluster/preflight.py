"""The checks of `arriero up` before anything starts, in the order of their cost.

First the sizes of the models, then this machine for a local cluster (nodes, memory, ports,
folders), and last the files of the models, whose check imports torch. Knows the order; knows
nothing of the checks themselves.
"""

from __future__ import annotations

from arriero.cluster.hosts import node_check, this_machine
from arriero.cluster.hosts.capacity import ClusterCapacity
from arriero.cluster.planner import model_check
from arriero.cluster.planner.capacity_check import refuse_spec
from arriero.cluster.spec.deployment import DeploymentSpec


def check_before_start(spec: DeploymentSpec, *, local: bool) -> None:
    """Refuse a spec that could never serve.

    Args:
        spec: the deployment.
        local: `up` will start a cluster on this machine.

    Raises:
        SpecError: a field does not fit the model or this machine; names the field.
        CheckpointError: a model folder is broken.
    """
    model_check.check_known_sizes(spec.models)
    if local:
        node = this_machine.resources(spec.ray)
        refuse_spec(spec, ClusterCapacity.of_nodes(spec, [node], shared=False))
        node_check.check_listeners(spec)
        if spec.gateway.prompt_guard is not None:
            node_check.check_prompt_guard(spec.gateway.prompt_guard.path)
        for model in spec.models:
            if model.kv.disk is not None:
                node_check.check_disk(model.name, model.kv.disk)
    model_check.check_models(spec.models)
