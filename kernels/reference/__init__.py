"""The backend that defines the others: plain torch, on any device."""

from arriero.kernels.reference.backend import ReferenceOps

__all__ = ["ReferenceOps"]
