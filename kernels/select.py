"""The choice of a backend by device and machine.

Knows the registry of backends; knows nothing of operations.
"""

from __future__ import annotations

import functools
import logging

import torch

from arriero.kernels import cpu
from arriero.kernels.ops import Ops
from arriero.kernels.registry import BACKENDS

_LOG = logging.getLogger(__name__)


def ops_for(
    device: torch.device,
    name: str | None = None,
    threads: int | None = None,
    *,
    batch_independent: bool = False,
    activation_dtype: str | None = None,
) -> Ops:
    """Return the backend `name`, or the best one for `device`.

    Args:
        device: device of weights and cache.
        name: a name of `BACKENDS`; None takes the best backend of the device (triton on a GPU, the
            C++ kernels on a CPU), on a CPU where it cannot run the reference, with a warning in the
            log once, and the reference on other devices.
        threads: CPU threads of the backend; None takes all CPUs of this process (cpu) or leaves
            torch's setting (reference). The cpu backend sets torch's own threads to 1.
        batch_independent: the bits of a row must not depend on other rows, even at a cost in speed
            (triton; see `TritonOps`). With cpu no row depends on other rows in any case.
        activation_dtype: "int8" rounds the inputs of int8 and int4 weights (cpu; see `CpuOps`);
            None for no rounding.

    Raises:
        ValueError: the name is unknown, the bits of this backend depend on the batch, or it cannot
            round inputs.
        RuntimeError: the backend cannot run here; the message says why.
    """
    if name not in (None, *BACKENDS):
        raise ValueError(f"kernels={name!r} is none of {', '.join(BACKENDS)}")
    best = next((key for key, each in BACKENDS.items() if each.best_on == device.type), "reference")
    if activation_dtype is not None and (name or best) != "cpu":
        raise ValueError(
            f"activation_dtype={activation_dtype!r} needs kernels='cpu', not {name or best!r}"
        )
    try:
        if activation_dtype is not None:
            return cpu.rounding_ops(device, threads, activation_dtype)
        backend = BACKENDS[name or best]
        return backend.make_ops(device, threads, batch_independent=batch_independent)
    except RuntimeError as error:
        if name is not None or device.type != "cpu" or activation_dtype is not None:
            raise
        _warn_once(str(error))
    return BACKENDS["reference"].make_ops(device, threads, batch_independent=batch_independent)


@functools.cache
def _warn_once(reason: str) -> None:
    _LOG.warning("running on the slow reference kernels: %s", reason)
