"""Processes for ranks: forked from a server that has imported torch, so that a start is cheap.

Knows what slices and ranks import; knows nothing of what they run. A process that `spawn` starts
spends three seconds of a core on the import of torch, and tests start hundreds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from arriero.shards.config.group import GroupConfig
from arriero.shards.leader import spawned_group
from arriero.shards.leader.remote_executor import RemoteExecutor

PRELOAD = (
    "torch",
    "torch.distributed",
    "hypothesis",
    "pytest",
    "arriero.kernels.cpu",
    "arriero.kernels.reference",
    "arriero.shards.checkpoint.reader",
    "arriero.shards.collectives.mesh",
    "arriero.shards.models.families",
    "arriero.shards.worker.loop",
    "arriero.shards.worker.runner",
    "arriero.shards.worker.select",
)
"""Imported once by the server. Without Triton: its interpreter is set up before its import."""


class _Process(ForkServerProcess):
    """A process with the environment of the test that starts it, not of the server."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        super().__init__(group, target, name, args, kwargs or {}, daemon=daemon)
        self._environment: dict[str, str] = {}

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class _Context(ForkServerContext):
    Process = _Process  # type: ignore[assignment]


context = _Context()
context.set_forkserver_preload(list(PRELOAD))


def spawn_group(config: GroupConfig) -> RemoteExecutor:
    """`spawned_group.spawn_group`, with slices forked from the server."""
    return spawned_group.spawn_group(config, context)
