"""What stands in for `torch.cuda`: graphs and memory, streams; threads see the device too.

All is put back at the end, so that other tests of the same process see no device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from support.fake_cuda.launches import checked_launches
from support.fake_cuda.ledger import Ledger, Recorded
from support.fake_cuda.ranks import gloo_for_nccl
from support.fake_cuda.streams import Event, Memory, Stream, Streams
from support.fake_cuda.symmetric import shared_blocks
from support.fake_cuda.tensors import (
    DEVICE,
    Simulation,
    bytes_allocated,
    device_guard,
)

NAME, CAPABILITY = "NVIDIA H200", (9, 0)


def ledger() -> Ledger:
    """Of the device that is in place."""
    assert Simulation.current is not None, "no simulated device is in place"
    return Simulation.current.ledger


class CUDAGraph:
    """What was recorded, and runs again over the same memory."""

    def __init__(self, *more: object) -> None:
        self.recorded: list[Recorded] = []
        self.touched: list[Memory] = []

    def replay(self) -> None:
        ledger().replays += 1
        ledger().streams.use((), self.touched, "a graph")
        with _disable_current_modes():
            for one in self.recorded:
                made = [m for m in pytree.tree_leaves(one.run()) if isinstance(m, Tensor)]
                for kept, new in zip(one.outputs, made, strict=True):
                    if kept is not None:
                        kept.copy_(new)


@contextmanager
def graph(
    made: CUDAGraph,
    pool: object = None,
    stream: object = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """As `torch.cuda.graph`."""
    device = ledger()
    with (
        device.capturing(made.recorded, capture_error_mode),
        device.streams.capturing() as touched,
    ):
        yield
    made.touched = touched


def _mem_get_info(device: object = None) -> tuple[int, int]:
    held, total = bytes_allocated(), ledger().free_bytes
    return total - held, total


def _synchronize(device: object = None) -> None:
    ledger().wait("torch.cuda.synchronize")
    ledger().streams.host_waits_for_all()


_convert, _listed = Tensor.to, torch.tensor


def _to(self: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:  # noqa: ANN401
    """`Tensor.to` that knows which cuda device is meant where none is numbered."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type == "cuda":
        device = DEVICE
    device = self.device if device is None else device
    if device == self.device and self.device.type == "cpu":
        return _convert(self, dtype or self.dtype, copy=copy)
    dtype = dtype or self.dtype
    if device == self.device and dtype == self.dtype and not copy:
        return self
    return torch.ops.aten._to_copy.default(
        self, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=memory
    )


def _tensor(data: Any, *, device: Any = None, **more: Any) -> Tensor:  # noqa: ANN401
    """`torch.tensor`: a list is made on the host, and copied."""
    made = _listed(data, **more)
    return made if device is None else made.to(device)


@contextmanager
def simulated(*, vendor_products: bool = True) -> Iterator[Ledger]:
    """A CUDA device in place of torch's, for this process, until the block ends.

    Args:
        vendor_products: the Triton backend leaves unquantized products to torch, as it does on a
            real device; under the interpreter it would take its own.
    """
    kept = Ledger()
    simulation = Simulation(kept)
    run_thread = threading.Thread.run

    def run(self: threading.Thread) -> None:
        # a mode is of one thread: those that begin meanwhile take it up
        if Simulation.current is not simulation:
            return run_thread(self)
        with simulation:
            return run_thread(self)

    streams = Streams(kept)
    cudart = SimpleNamespace(cudaHostRegister=lambda *args: 1, cudaHostUnregister=lambda *args: 0)
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "stream": streams.on,
        "current_stream": lambda device=None: streams.current,
        "default_stream": lambda device=None: streams.default,
        "graph_pool_handle": lambda: (0, 1),
        "memory_allocated": lambda device=None: bytes_allocated(),
        "mem_get_info": _mem_get_info,
        "synchronize": _synchronize,
        "empty_cache": lambda: None,
        "cudart": lambda: cudart,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(Tensor, "to", _to))
        stack.enter_context(mock.patch.object(torch, "tensor", _tensor))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run))
        stack.enter_context(mock.patch.object(Simulation, "current", simulation))
        stack.enter_context(mock.patch.object(Streams, "in_place", streams))
        stack.enter_context(device_guard())
        stack.enter_context(checked_launches(kept))
        stack.enter_context(gloo_for_nccl(kept))
        stack.enter_context(shared_blocks())
        if vendor_products:
            stack.enter_context(_vendor_products())
        stack.enter_context(simulation)
        yield kept


@contextmanager
def _vendor_products() -> Iterator[None]:
    import arriero.kernels.triton as package

    made: Callable[..., Any] = package.triton_ops

    def ops(device: torch.device, *, batch_independent: bool | None = None) -> Any:  # noqa: ANN401
        return made(device, batch_independent=bool(batch_independent))

    with mock.patch.object(package, "triton_ops", ops):
        yield
