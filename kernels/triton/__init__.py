"""The backend for NVIDIA GPUs: kernels in Triton; torch multiplies unquantized weights.

An import of this package imports no Triton: `triton_ops` does, and names a missing package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from arriero.kernels.triton.backend import TritonOps


def triton_ops(device: torch.device, *, batch_independent: bool | None = None) -> TritonOps:
    """The backend on `device`.

    Args:
        device: a CUDA device; or for tests the CPU under Triton's interpreter (TRITON_INTERPRET=1
            in the environment before this call).
        batch_independent: see `TritonOps`; None is True under the interpreter, else False.

    Raises:
        RuntimeError: this machine or environment cannot run the backend; the message says why.
    """
    try:
        from arriero.kernels.triton import launch
    except ImportError as error:
        raise RuntimeError(
            f"kernels='triton' needs the package triton, which is not installed ({error}); "
            "install triton (CUDA builds of torch include it) or use kernels='reference'"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"kernels='triton' on {device}: torch finds no CUDA device here")
    elif device.type != "cpu" or not launch.INTERPRETED:
        raise RuntimeError(
            f"kernels='triton' cannot run on {device.type!r}: it needs a CUDA device; "
            "TRITON_INTERPRET=1 in the environment interprets kernels on the CPU (slow, for tests)"
        )
    from arriero.kernels.triton.backend import TritonOps

    if batch_independent is None:
        batch_independent = launch.INTERPRETED
    return TritonOps(device, batch_independent=batch_independent)
