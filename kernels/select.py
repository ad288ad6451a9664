"""The choice of a backend by device and machine.

Knows names of backends; knows nothing of operations.
"""

from __future__ import annotations

import functools
import logging

import torch

from arriero.kernels.ops import Ops

BACKENDS = ("reference", "cpu", "triton")

_LOG = logging.getLogger(__name__)


def ops_for(
    device: torch.device,
    name: str | None = None,
    threads: int | None = None,
    *,
    batch_independent: bool = False,
) -> Ops:
    """Return the backend `name`, or the best one for `device`.

    Args:
        device: device of weights and cache.
        name: a name of `BACKENDS`; None takes triton on a GPU; on a CPU the C++ kernels if built,
            else the reference, with a warning in the log once.
        threads: CPU threads of the backend; None takes all CPUs of this process (cpu) or leaves
            torch's setting (reference). The cpu backend sets torch's own threads to 1.
        batch_independent: the bits of a row must not depend on other rows, even at a cost in speed
            (triton; see `TritonOps`). With cpu no row depends on other rows in any case.

    Raises:
        ValueError: the name is unknown, or the bits of this backend depend on the batch.
        RuntimeError: the backend cannot run here; the message says why.
    """
    if name not in (None, *BACKENDS):
        raise ValueError(f"kernels={name!r} is none of {', '.join(BACKENDS)}")
    if name == "triton" or (name is None and device.type == "cuda"):
        from arriero.kernels.triton import triton_ops

        return triton_ops(device, batch_independent=batch_independent or None)
    if name == "cpu":
        return _cpu(device, threads)
    if name is None and device.type == "cpu":
        try:
            return _cpu(device, threads)
        except RuntimeError as error:
            _warn_once(str(error))
    if batch_independent:
        raise ValueError(
            "batch_independent=True: rows of the reference kernels are independent to rounding "
            "only; use kernels='cpu' or 'triton'"
        )
    from arriero.kernels.reference import ReferenceOps

    if threads is not None:
        torch.set_num_threads(threads)
    return ReferenceOps(device)


def _cpu(device: torch.device, threads: int | None) -> Ops:
    from arriero.kernels.cpu import CpuOps

    return CpuOps(device, threads)


@functools.cache
def _warn_once(reason: str) -> None:
    _LOG.warning("running on the slow reference kernels: %s", reason)
