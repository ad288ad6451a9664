"""A slice's process: a Ray actor around `arriero.shards.worker.loop`.

Knows how to be placed and found; knows nothing of what a slice computes.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from arriero.cluster.hosts.log_level import set_log_level
from arriero.cluster.hosts.nodes import node_address

if TYPE_CHECKING:
    from arriero.shards.protocol.rendezvous import LeaderEndpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceLocation:
    """Where a slice runs: its node's id and address, its process, and its node's cores."""

    node_id: str
    address: str
    pid: int
    cores: int


class SliceActor:
    """One slice; its leader owns it, and it dies with its leader."""

    def __init__(self, log_level: str) -> None:
        set_log_level(log_level)
        # torch takes seconds to import: begin while the leader still hears of its other slices
        self._import = threading.Thread(target=_import_runner, daemon=True)
        self._import.start()

    def location(self) -> SliceLocation:
        """Say where it runs."""
        context = ray.get_runtime_context()
        return SliceLocation(
            node_id=context.get_node_id(),
            address=node_address(),
            pid=os.getpid(),
            cores=len(os.sched_getaffinity(0)),
        )

    def set_log_level(self, level: str) -> None:
        """Log what is of this level or above; may be called while it serves."""
        set_log_level(level)

    def digest(self, where: str) -> str:
        """The checkpoint's digest; asked here because it takes torch, which a leader spares."""
        from arriero.shards.checkpoint.reader import Checkpoint

        return Checkpoint.open(where).digest

    def warm(self, where: str) -> int:
        """Load this slice's code, and a checkpoint into the node's page cache; gives its bytes."""
        from arriero.shards.checkpoint import page_cache, remote

        self._import.join()
        return 0 if remote.is_url(where) else page_cache.warm(Path(where))

    def free_bytes(self) -> int:
        """Bytes of this slice's GPU that nobody holds, its own context aside."""
        from arriero.shards.worker.cuda.device import free_bytes

        self._import.join()
        return free_bytes()

    def run(self, rank: int, ticket: LeaderEndpoint, address: str) -> None:
        """Serve as `rank` of the ticket's group; returns when told to stop.

        Args:
            rank: stage * tp + tp rank.
            ticket: of the group's executor.
            address: of this node, for the ranks' own sockets.
        """
        from arriero.shards.worker.loop import run_slice

        self._import.join()
        run_slice(rank, ticket, host=address)  # Ray ends this process if the leader's is gone


def _import_runner() -> None:
    import arriero.shards.worker.runner  # noqa: F401
