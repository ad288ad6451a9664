"""Bytes of a checkpoint in the form that a plan's dtype goes with.

What a file holds is not what a rank holds: the backends keep int4's scales and zero points as
float32, files keep them in 16 and 4 bits.
"""

from __future__ import annotations

from arriero.cluster.planner.rank_weights import Weights
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import modules_of, tensor_specs
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.parts import AnyModel


def stored_bytes(model: AnyModel, weights: Weights) -> int | None:
    """Bytes of all tensors; None where no form holds this model so.

    What is quantized on load has no form of its own: its checkpoint is a plain one.
    """
    scheme = weights.scheme
    if weights.tables is not None:
        return None
    if scheme is None and weights.precision is not None:
        if weights.precision == "int4":
            scheme = QuantScheme(method="awq", group_size=weights.group_size)
        else:
            names = {
                module.name
                for module in modules_of(model, QuantScheme(method="compressed-tensors"))
                if module.product and module.kind in ("head", "router", "vision")
            }
            scheme = QuantScheme(method="compressed-tensors", ignored=tuple(sorted(names)))
    try:
        return sum(tensor.nbytes for tensor in tensor_specs(model, scheme))
    except CheckpointError:
        return None
