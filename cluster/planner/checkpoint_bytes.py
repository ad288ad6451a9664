"""Bytes of a checkpoint on disk in the form that belongs to a plan's dtype.

A file and a rank differ: backends keep the scales and zero points of a file's int4 as float32,
files keep scales in 16 bits and zero points in 4. Knows tensors of files; knows nothing of ranks.
"""

from __future__ import annotations

from arriero.cluster.planner.weight_forms import Weights
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.checkpoint.formats.stored import modules_of, tensor_specs
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.parts import AnyModel


def stored_bytes(model: AnyModel, weights: Weights) -> int | None:
    """Bytes of all tensors; None where no checkpoint form exists for `weights`.

    Weights that are quantized on load have no form on disk: their checkpoint is plain.
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
