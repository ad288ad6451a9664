"""The backend that defines the results of the others: plain torch, on any device."""

from arriero.kernels.reference.backend import ReferenceOps

__all__ = ["ReferenceOps"]
