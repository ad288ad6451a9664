"""The few things of CUDA that a runner needs, behind one protocol, so that it is tested without.

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
    """A point in the device's work."""

    def query(self) -> bool:
        """Whether the device is past it."""

    def synchronize(self) -> None:
        """Wait until it is."""


class Replayable(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Queue it again, over the same tensors."""


class Device(Protocol):
    """Where steps run."""

    def capture(self, work: Callable[[], None]) -> Replayable:
        """Run `work` once to warm up, then capture it; its effects may happen several times."""

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies from and to on its own."""

    def mark(self) -> Event:
        """The point after all that was queued so far."""

    def allocated(self) -> int:
        """Bytes of tensors on the device."""


class _Graph:
    """A CUDA graph with what its kernels point to."""

    def __init__(self, graph: torch.cuda.CUDAGraph, work: Callable[[], None]) -> None:
        self._graph, self._work = graph, work

    def replay(self) -> None:
        self._graph.replay()


class CudaDevice:
    """The real one. All graphs share one pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> Replayable:
        """See `Device.capture`."""
        # kernels compile and libraries allocate on their first run, which no capture allows
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # "global" would forbid other threads of this process what the tiers' threads do meanwhile
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
    """Bytes of a device that nobody holds; makes this process's context on it, and leaves it."""
    return torch.cuda.mem_get_info(index)[0]


def free_bytes_of(slices: int) -> list[int]:
    """Bytes that nobody holds on the devices of a group whose slices all run on this machine.

    Asked in a process that ends, so that its contexts take nothing of what the slices will have.
    """
    if slices == 1:
        return [free_bytes()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return list(pool.map(free_bytes, range(slices)))
