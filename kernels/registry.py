"""Every backend by its name: a line for each.

Knows backends before they are imported; needs no torch, so that planners may ask.
"""

from __future__ import annotations

from arriero.kernels import cpu, reference, triton
from arriero.kernels.backend import Backend

Kernels = str
"""Name of a backend: a key of `BACKENDS`."""

BACKENDS: dict[Kernels, Backend] = {
    "reference": reference.ReferenceBackend(),
    "cpu": cpu.CpuBackend(),
    "triton": triton.TritonBackend(),
}
