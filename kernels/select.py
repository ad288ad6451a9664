"""The choice of a backend: by device and by what this machine can run."""

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
        device: where weights and cache will live.
        name: one of `BACKENDS`; None picks: on a GPU triton; on a CPU the C++ kernels where they
            were built, else the reference, and the log says so once.
        threads: CPU threads that the backend may use; None takes all CPUs of this process (cpu)
            or leaves torch's setting (reference). The cpu backend sets torch's own to 1.
        batch_independent: a row's bits must not depend on the rows beside it, also where that
            costs speed (triton; see `TritonOps`). They never do with cpu.

    Raises:
        ValueError: the name is unknown, or this backend's bits depend on the batch.
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
            _say_once(str(error))
    if batch_independent:
        raise ValueError(
            "batch_independent=True: the reference kernels keep it to rounding only; use "
            "kernels='cpu' or 'triton'"
        )
    from arriero.kernels.reference import ReferenceOps

    if threads is not None:
        torch.set_num_threads(threads)
    return ReferenceOps(device)


def _cpu(device: torch.device, threads: int | None) -> Ops:
    from arriero.kernels.cpu import CpuOps

    return CpuOps(device, threads)


@functools.cache
def _say_once(why: str) -> None:
    _LOG.warning("running on the slow reference kernels: %s", why)
