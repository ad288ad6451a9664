"""The choice of a backend: by device and by what this machine can run."""

from __future__ import annotations

import torch

from arriero.kernels.ops import Ops

BACKENDS = ("reference", "cpu", "triton")


def ops_for(device: torch.device, name: str | None = None, threads: int | None = None) -> Ops:
    """Return the backend `name`, or the best one for `device`.

    Args:
        device: where weights and cache will live.
        name: one of `BACKENDS`; None picks.
        threads: CPU threads that the backend may use; None leaves torch's setting.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here; the message says why.
    """
    from arriero.kernels.reference import ReferenceOps

    if name not in (None, *BACKENDS):
        raise ValueError(f"kernels={name!r} is none of {', '.join(BACKENDS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "triton" or (name is None and device.type == "cuda"):
        from arriero.kernels.triton import triton_ops

        return triton_ops(device)
    return ReferenceOps(device)
