"""Copies of small host arrays to a rank's device, without a wait for the device.

A copy from pageable memory makes the host wait; pinned memory is copied while the host goes on, and
torch keeps the memory until then. Knows arrays; knows nothing of their meaning.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy of `array` on the device; on a CPU it may share the array's memory."""
    # torch refuses read-only views of received messages, which have only a few bytes
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
