"""Weights from mapped files to the device, through two pinned buffers in turn.

While the first buffer travels over the link, the second is filled from the file, so that loading
runs at the slower of the two rates. A copy from pageable memory would take the sum of both times.
Knows tensors; knows nothing of files and layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20


class Upload:
    """Copies host tensors of any strides into device tensors. On CPU only a plain copy."""

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._on_cuda = device.type == "cuda"
        self._chunk_bytes = chunk_bytes
        self._buffers: list[Tensor] = []
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Fill `target` from `source`, of the same shape; the dtypes may differ."""
        if source.device.type != "cpu" or not source.numel():
            target.copy_(source)
            return
        if not self._buffers:
            self._buffers = [
                torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=self._on_cuda)
                for _ in range(2)
            ]
        if source.dim() != 2:
            source, target = source.reshape(1, -1), target.view(1, -1)
        rows, columns = source.shape
        row_bytes = columns * source.element_size()
        if row_bytes > self._chunk_bytes:  # only a long vector has such rows
            target.copy_(source)
            return
        step = self._chunk_bytes // row_bytes
        for first in range(0, rows, step):
            self._send(target[first : first + step], source[first : first + step])

    def _send(self, target: Tensor, source: Tensor) -> None:
        self._turn ^= 1
        sent = self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        size = source.numel() * source.element_size()
        staged = self._buffers[self._turn][:size].view(source.dtype).view(source.shape)
        staged.copy_(source)
        # The device converts: the link carries the bytes of the file.
        target.copy_(staged.to(target.device, non_blocking=True))
        if self._on_cuda:
            sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.record()
            self._sent[self._turn] = sent
