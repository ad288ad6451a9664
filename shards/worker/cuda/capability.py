"""What a GPU's compute capability rules out, said before any weight is read.

Needs no torch. Knows formats and capabilities; knows nothing of kernels.
"""

from __future__ import annotations

from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import SpecError

FP8_CAPABILITY = (8, 9)
"""The first compute capability with float8 numbers (Ada Lovelace)."""


def check_capability(
    config: GroupConfig, scheme: QuantScheme | None, capability: tuple[int, int]
) -> None:
    """Check that a GPU can run the formats of a group.

    Args:
        config: settings of the group.
        scheme: quantization of the checkpoint; None for plain weights.
        capability: compute capability of the GPU.

    Raises:
        SpecError: the GPU has no float8 numbers, and the group needs them.
    """
    if capability >= FP8_CAPABILITY or config.kernels == "reference":
        return
    needs = "needs compute capability 8.9 or newer; this device has " + "{}.{}".format(*capability)
    if config.quantization == "fp8":
        raise SpecError(f"`quantization`='fp8' {needs}; use int8")
    if config.quantization is None and scheme is not None and scheme.kind == "fp8":
        raise SpecError(
            f"the checkpoint's format {scheme.method} {needs}; use the model's plain checkpoint "
            "with `quantization`='int8'"
        )
