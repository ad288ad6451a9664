"""The CUDA functions that a runner needs, behind a protocol, so that tests run without CUDA.

Knows streams, graphs and pinned memory; knows nothing of models.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in the queue of the device."""

    def query(self) -> bool:
        """Whether the device has passed the event."""

    def synchronize(self) -> None:
        """Wait until the device has passed the event."""


class Replayable(Protocol):
    """A captured graph."""

    def replay(self) -> None:
        """Queue the graph over the same tensors."""


class Device(Protocol):
    """The device that runs the steps."""

    def capture(self, work: Callable[[], None]) -> Replayable:
        """Run `work` to warm up, then capture `work`; effects may happen several times."""

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned host memory for asynchronous copies."""

    def mark(self) -> Event:
        """An event after all queued work."""

    def allocated(self) -> int:
        """Bytes of tensors on the device."""


class _Graph:
    """A CUDA graph, and a reference to the tensors of the captured work."""

    def __init__(self, graph: torch.cuda.CUDAGraph, work: Callable[[], None]) -> None:
        self._graph, self._work = graph, work

    def replay(self) -> None:
        self._graph.replay()


class CudaDevice:
    """A CUDA device. All graphs share a memory pool, since only one graph runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> Replayable:
        """See `Device.capture`."""
        # kernels compile and libraries allocate in their first run, which a capture forbids
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # "global" would make the calls of the transfer workers' threads fail during a capture
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return _Graph(graph, work)

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Device.host`."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def mark(self) -> Event:
        """See `Device.mark`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def allocated(self) -> int:
        """See `Device.allocated`."""
        return torch.cuda.memory_allocated(self._device)


def free_bytes(index: int = 0) -> int:
    """Free bytes of a device; creates a CUDA context of this process, which stays."""
    return torch.cuda.mem_get_info(index)[0]


def free_bytes_of(slices: int) -> list[int]:
    """Free bytes of the devices of a group whose slices all run on this machine.

    Measures in a process that ends, so that its CUDA contexts leave the memory to the slices.
    """
    if slices == 1:
        return [free_bytes()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return list(pool.map(free_bytes, range(slices)))
