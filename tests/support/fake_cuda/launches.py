"""Triton's launcher over the simulated device: its interpreter, which refuses pointers of the host.

Knows Triton's interpreter and tensors; knows no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from support.fake_cuda.ledger import Ledger, Recorded, where
from support.fake_cuda.tensors import DeviceTensor, plain_memory


@contextmanager
def checked_launches(ledger: Ledger) -> Iterator[None]:
    """Check and count each launch; nothing to do where Triton is not installed."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        yield
        return
    interpret = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        name = self.fn.__name__
        for at, one in enumerate((*args, *kwargs.values())):
            if isinstance(one, Tensor) and not isinstance(one, DeviceTensor) and one.numel():
                raise ValueError(
                    f"Pointer argument (at {at}) cannot be accessed from Triton (cpu tensor?) "
                    f"in {name} @ {where()}"
                )
        plain_args = [plain_memory(one) for one in args]
        plain_kwargs = {key: plain_memory(one) for key, one in kwargs.items()}

        def run() -> None:
            ledger.launches[name] += 1
            with _disable_current_modes():
                interpret(self, *plain_args, **plain_kwargs)

        run()
        if ledger.recording is not None:
            ledger.recording.append(Recorded(run))

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield
