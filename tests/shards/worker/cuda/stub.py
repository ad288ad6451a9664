"""A device without CUDA: graphs are functions called again, copies happen late, calls are noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class StubEvent:
    """Past only once it was waited for."""

    waits: list[StubEvent]
    passed: bool = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True
        self.waits.append(self)


@dataclass
class StubGraph:
    work: Callable[[], None]
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.work()


@dataclass
class StubDevice:
    graphs: list[StubGraph] = field(default_factory=list)
    waits: list[StubEvent] = field(default_factory=list)
    held: int = 0

    def capture(self, work: Callable[[], None]) -> StubGraph:
        work()  # the warm-up
        work()  # what a capture would record
        self.graphs.append(StubGraph(work))
        return self.graphs[-1]

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, 77, dtype=dtype)

    def mark(self) -> StubEvent:
        return StubEvent(self.waits)

    def allocated(self) -> int:
        return self.held
