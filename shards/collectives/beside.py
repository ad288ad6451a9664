"""Collectives on a second stream of a GPU, beside the products of the first.

`Beside.begin` queues work on the second stream; `Pending.wait` lets the current stream wait for the
work's result. The host waits for neither. Two rules keep memory safe without a list of streams for
each tensor: work begins after everything that the current stream has queued so far, and a `Pending`
holds what the work reads until the current stream waits. So memory that either stream frees is used
again only after the other stream has passed its last use.

A communicator is used from one stream at a time, in the order of `begin` and `wait`, which all
ranks share. Within the capture of a CUDA graph both are edges of the graph; each `begin` needs its
`wait` there.

Not run on GPUs yet: `ARRIERO_OVERLAP=0` leaves all work on one stream. Knows streams and the store
of the rendezvous; knows nothing of models and collectives.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch._C._distributed_c10d import Store

T = TypeVar("T")
_log = logging.getLogger(__name__)

SWITCH = "ARRIERO_OVERLAP"
"""Environment variable; 0 turns the second stream off."""


class Pending(Generic[T]):
    """The result of work that has begun."""

    def __init__(
        self, work: Callable[[], T], result: T, device: torch.device, done: torch.cuda.Event | None
    ) -> None:
        """Hold a result; `done` is None where the work is on the current stream itself."""
        self._kept: tuple[Callable[[], T], T] | None = (work, result)
        self._device, self._done = device, done

    def wait(self) -> T:
        """The result, for what the current stream queues after this call. Call once."""
        assert self._kept is not None, "a result is taken once"
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
        (_, result), self._kept = self._kept, None
        return result


class Beside:
    """The second stream of a device; without it, work runs at once on the current stream.

    Attributes:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    @property
    def on(self) -> bool:
        """Whether there is a second stream; the same on all ranks."""
        return self._stream is not None

    def open(self, store: Store, rank: int, num_ranks: int) -> None:
        """Make the second stream, unless it is turned off on any rank; every rank calls this.

        Args:
            store: store of the rendezvous.
            rank: rank in the group.
            num_ranks: ranks of the group.
        """
        if self.device.type != "cuda":
            return
        store.set(f"overlap/{rank}", os.environ.get(SWITCH, "1"))
        words = [store.get(f"overlap/{other}").decode() for other in range(num_ranks)]
        off = [other for other, word in enumerate(words) if word == "0"]
        if rank == 0:
            reason = f"off (rank {off[0]}: {SWITCH}=0)" if off else "on"
            _log.info("collectives beside products: %s", reason)
        if not off:
            # a product fills the GPU: with a higher priority a collective gets the next free units
            self._stream = torch.cuda.Stream(  # type: ignore[no-untyped-call]
                self.device, priority=-1
            )

    def close(self) -> None:
        """Work runs on the current stream from now on."""
        self._stream = None

    def begin(self, work: Callable[[], T]) -> Pending[T]:
        """Queue work that other work of the current stream may run beside.

        Args:
            work: queues kernels and collectives, and gives what they make.
        """
        if self._stream is None:
            return Pending(work, work(), self.device, None)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            result = work()
        return Pending(work, result, self.device, self._stream.record_event())
