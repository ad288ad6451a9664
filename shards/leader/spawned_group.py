"""Starts the slices of a group as child processes of this process.

Knows processes; knows nothing of messages.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess

from arriero.kernels.cpu import topology
from arriero.kernels.cpu.topology import Place
from arriero.shards.config.group import GroupConfig
from arriero.shards.leader.remote_executor import RemoteExecutor
from arriero.shards.leader.visible_gpus import device_of
from arriero.shards.protocol.failure import Evidence, Kind
from arriero.shards.protocol.rendezvous import LeaderEndpoint
from arriero.shards.worker.loop import run_slice


def spawn_group(
    config: GroupConfig, context: SpawnContext | ForkServerContext | None = None
) -> RemoteExecutor:
    """Start a group's slices as child processes; `close` stops the processes.

    Args:
        config: resolved config of the group.
        context: how processes start; None: `spawn`, which inherits nothing.

    Raises:
        GroupFailed: fewer GPUs are visible than slices are needed.
    """
    if config.device == "cuda":
        for rank in range(config.world_size):
            device_of(rank)  # a missing GPU is reported before any start
    executor = RemoteExecutor(config)
    context = context or multiprocessing.get_context("spawn")
    children: list[BaseProcess] = [
        context.Process(target=_run_child, args=(rank, executor.endpoint), name=f"slice-{rank}")
        for rank in range(config.world_size)
    ]
    for child in children:
        child.start()

    def find_lost() -> Evidence | None:
        for rank, child in enumerate(children):
            if child.exitcode is not None:
                summary = f"slice {rank} (pid {child.pid}) ended with exit code {child.exitcode}"
                return Evidence(kind=Kind.CRASH, summary=summary, rank=rank, pid=child.pid or 0)
        return None

    def stop_slices() -> None:
        for child in children:
            child.join(5)
            if child.exitcode is None:
                child.kill()
                child.join()

    executor.supervise(find_lost, stop_slices)
    return executor


def _run_child(rank: int, endpoint: LeaderEndpoint) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(endpoint.config.threads or 1))
    if endpoint.config.device == "cuda":  # a GPU for each rank: NCCL refuses two ranks on one GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = device_of(rank)
    else:
        place = Place(rank, endpoint.config.world_size)
        topology.stay_near(place, endpoint.config.threads or 1)
    leader = multiprocessing.parent_process()
    assert leader is not None, "a slice is a child process"
    try:
        run_slice(rank, endpoint, leader_alive=leader.is_alive)
    except Exception:
        raise SystemExit(1) from None  # the leader has the cause
