"""The CPU backend: C++ behind a plain C interface, loaded with ctypes."""

from arriero.kernels.cpu.backend import CpuOps

__all__ = ["CpuOps"]
