"""The process of a slice: a Ray actor around `arriero.shards.worker.loop`.

Knows the location of the process; knows nothing of the computation of a slice.
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
from arriero.kernels.cpu import topology
from arriero.kernels.cpu.topology import Place

if TYPE_CHECKING:
    from arriero.shards.protocol.rendezvous import LeaderEndpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceLocation:
    """Location of a slice.

    Attributes:
        node_id: Ray's id of the node.
        address: of the node.
        pid: process of the slice.
        cores: CPU cores of the node; hyperthreads count once.
    """

    node_id: str
    address: str
    pid: int
    cores: int


class SliceActor:
    """One slice; the leader owns the actor, which ends with the leader."""

    def __init__(self, log_level: str, log_format: str) -> None:
        set_log_level(log_level, log_format)
        # importing torch takes seconds: start now, while the leader still places other slices
        self._import = threading.Thread(target=_import_runner, daemon=True)
        self._import.start()

    def location(self) -> SliceLocation:
        """The location of this process."""
        context = ray.get_runtime_context()
        return SliceLocation(
            node_id=context.get_node_id(),
            address=node_address(),
            pid=os.getpid(),
            cores=len(topology.cores()),
        )

    def set_log_level(self, level: str, log_format: str) -> None:
        """Log messages of this level and above; also while the slice serves."""
        set_log_level(level, log_format)

    def digest(self, path: str, sources: tuple[str, ...] | None = None) -> str:
        """The digest of a checkpoint; computed here, since leaders do not import torch.

        Args:
            path: model folder.
            sources: of pushed weights, which are named by all their bytes; None for none.
        """
        from arriero.shards.checkpoint.content_digest import content_digest
        from arriero.shards.checkpoint.overlay import open_weights
        from arriero.shards.checkpoint.reader import Checkpoint

        if sources is None:
            return Checkpoint.open(path).digest
        return content_digest(open_weights(path, sources))

    def warm(self, path: str) -> int:
        """Load code, and read a checkpoint into the page cache; returns the number of bytes."""
        from arriero.shards.checkpoint import page_cache, remote

        self._import.join()
        return 0 if remote.is_url(path) else page_cache.warm(Path(path))

    def free_bytes(self) -> int:
        """Free bytes of this slice's GPU; the slice's own CUDA context counts as used."""
        from arriero.shards.worker.cuda.device import free_bytes

        self._import.join()
        return free_bytes()

    def run(self, rank: int, endpoint: LeaderEndpoint, address: str, place: Place) -> None:
        """Serve as a rank of the endpoint's group; returns after the stop message.

        Args:
            rank: rank in the group.
            endpoint: of the group's executor.
            address: of this node, for the sockets between ranks.
            place: of this slice among the group's slices on the node.
        """
        from arriero.shards.worker.loop import run_slice

        if endpoint.config.device == "cpu":
            topology.stay_near(place, endpoint.config.threads or 1)
        self._import.join()
        run_slice(rank, endpoint, host=address)  # Ray ends this process with the leader's


def _import_runner() -> None:
    import arriero.shards.worker.runner  # noqa: F401
