"""Triton's launcher over the simulated device: its interpreter, which refuses pointers of the host.

Knows Triton's interpreter and tensors; knows no kernel.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from support.fake_cuda.ledger import Ledger, Recorded, where
from support.fake_cuda.tensors import DeviceTensor, plain_memory


def specialization(executor: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:  # noqa: ANN401
    """What Triton would compile a binary for: a launch with another value compiles another.

    Constants and launch options by value; tensors by dtype and by whether they are aligned to 16
    bytes; numbers by whether they are 1 or divisible by 16, except counts.

    Args:
        executor: Triton's interpreter of a kernel.
        args: arguments by place, as tensors of CPU memory.
        kwargs: arguments by name, and launch options.
    """
    from arriero.kernels.triton.launch import COUNTS

    by_name = dict(zip(executor.arg_names, args, strict=False)) | kwargs
    by_name.pop("ROWS", None)  # rows of a program: the interpreter's own choice, 1 on a device
    parts: list[Any] = []
    for name, value in by_name.items():
        if isinstance(value, Tensor):
            parts.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif value is None or name in executor.constexprs or name not in executor.arg_names:
            parts.append((name, str(value)))
        elif isinstance(value, int):
            width = 32 if -(2**31) <= value < 2**31 else 64
            counts = name in COUNTS
            parts.append((name, width, not counts and (value == 1, value % 16 == 0)))
        else:
            parts.append((name, type(value)))
    return tuple(parts)


@contextmanager
def checked_launches(ledger: Ledger) -> Iterator[None]:
    """Check and count each launch; nothing to do where Triton is not installed."""
    try:
        from triton._C.libtriton import ir
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
    except ImportError:
        yield
        return
    interpret, signal = GridExecutor.__call__, InterpreterBuilder.create_atomic_rmw

    def signal_and_yield(*args: Any) -> Any:  # noqa: ANN401
        """A rank that asks for another rank's signal leaves that rank the core."""
        result = signal(*args)
        if args[-1] == ir.MEM_SYNC_SCOPE.SYSTEM:
            time.sleep(0.0005)
        return result

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        name = self.fn.__name__
        used = [one.memory for one in (*args, *kwargs.values()) if isinstance(one, DeviceTensor)]
        ledger.streams.use((), filter(None, used), name)  # a kernel may write to any of them
        for at, one in enumerate((*args, *kwargs.values())):
            if isinstance(one, Tensor) and not isinstance(one, DeviceTensor) and one.numel():
                raise ValueError(
                    f"Pointer argument (at {at}) cannot be accessed from Triton (cpu tensor?) "
                    f"in {name} @ {where()}"
                )
        plain_args = [plain_memory(one) for one in args]
        plain_kwargs = {key: plain_memory(one) for key, one in kwargs.items()}

        binary = (name, *specialization(self, plain_args, plain_kwargs))
        if binary not in ledger.binaries:
            ledger.binaries.add(binary)
            ledger.compiles[name] += 1

        def run() -> None:
            ledger.launches[name] += 1
            with _disable_current_modes():
                interpret(self, *plain_args, **plain_kwargs)

        run()
        if ledger.recording is not None:
            ledger.recording.append(Recorded(run, name))

    with (
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", signal_and_yield),
    ):
        yield
