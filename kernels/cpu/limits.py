"""What the machine can do at best, for benchmarks: rates of memory and of multiplication.

Knows the threads of a backend; knows nothing of operations.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from arriero.kernels.cpu.backend import CpuOps
from arriero.kernels.cpu.weights import TYPES


def read_bytes(ops: CpuOps, data: Tensor) -> None:
    """Read every byte once on all threads, to measure the memory rate beyond the caches."""
    checksum = ctypes.c_float()
    ops.call("read", data.data_ptr(), data.nbytes, ctypes.addressof(checksum))


def multiply_only(ops: CpuOps, rounds: int, dtype: torch.dtype) -> float:
    """Multiply and add in registers alone; returns the operations, 2 for each multiply-add."""
    operations = ctypes.c_double()
    ops.call("multiply", rounds, TYPES[dtype], ctypes.addressof(operations))
    return operations.value
