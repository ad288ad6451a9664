"""A GPU that is not there, as far as a compiler asks; launches become compiles.

Knows Triton's driver and launcher, and that block sizes depend on the GPU; knows no kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from arriero.kernels.triton import tuning

META = torch.device("meta")
PROCESSORS = {80: 108, 90: 132, 100: 148}
"""Multiprocessors of A100, H200 and B200, which decide how products are split."""


@dataclass
class Compiled:
    """A binary, or the reason why there is none.

    Attributes:
        case: name of the case that launched the kernel.
        kernel: name of the kernel's function.
        capability: 80 for compute capability 8.0.
        binary: Triton's compiled kernel; None after an error.
        seconds: time of the compile; near 0 from Triton's cache.
        error: text of the error.
    """

    case: str
    kernel: str
    capability: int
    binary: Any = None
    seconds: float = 0.0
    error: str = ""


@dataclass
class AbsentGpu:
    """As much of a driver as a compile asks for.

    Triton keeps compiled kernels by device index: the index is the capability here, so that a
    process can compile for several GPUs.
    """

    capability: int = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return META


@contextmanager
def compiles_only(
    gpu: AbsentGpu, name: str, seen: Callable[[Compiled], None], case: Callable[[], str]
) -> Iterator[None]:
    """Turn every launch of a kernel into a compile for `gpu`.

    Args:
        gpu: the GPU; its capability may change between launches.
        name: name of the device, for the tuned block sizes.
        seen: called once for each binary, and for each failure.
        case: gives the name of the current case.
    """
    run, hashes = jit.JITFunction.run, set[tuple[int, str]]()

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # noqa: ANN401
        started = time.perf_counter()
        row = Compiled(case(), self.fn.__name__, gpu.capability)
        try:
            row.binary = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # the compiler has many kinds of errors
            row.error = " ".join(f"{type(error).__name__}: {error}".split())[-400:]
            seen(row)
            return
        row.seconds = time.perf_counter() - started
        key = (gpu.capability, row.binary.hash)
        if key not in hashes:
            hashes.add(key)
            seen(row)

    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set: nothing would be compiled"
    driver.set_active(gpu)
    for cached in (tuning._names, tuning.split_rule):
        cached.cache_clear()  # it holds what belongs to the GPU before
    properties = SimpleNamespace(multi_processor_count=PROCESSORS.get(gpu.capability, 132))
    patches: tuple[tuple[Any, str, Any], ...] = (
        (jit.JITFunction, "run", compiled),
        (torch.cuda, "get_device_name", lambda device=None: name),
        (torch.cuda, "get_device_capability", lambda device=None: divmod(gpu.capability, 10)),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        # the backend asks a tensor which device's path to take
        (torch.Tensor, "is_cuda", property(lambda self: True)),
    )
    with ExitStack() as stack:
        for place, attribute, value in patches:
            stack.enter_context(mock.patch.object(place, attribute, value))
        yield
