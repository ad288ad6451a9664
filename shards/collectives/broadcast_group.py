"""A process group in which a trainer broadcasts tensors to slices, beside their group's own mesh.

Bytes travel over gloo, through host memory, so that a broadcast needs neither the devices nor the
order of the steps' collectives. The ranks meet in a `TCPStore` of the trainer. Knows ranks and
bytes; knows nothing of models. Neither store nor gloo asks for a credential: any process that
reaches the ports could join.
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from arriero.shards.errors import CheckpointError

TRAINER = 0
"""Rank of the trainer."""
PREFIX = "arriero-weights"
"""Prefix of the group's keys in the store."""
_RETRY_S = 0.2


class BroadcastGroup:
    """One rank's view of the group.

    Args:
        store: store of the rendezvous.
        rank: of this process.
        world_size: the trainer and all slices.
        address: address of this process for the others; a loopback address binds to loopback.
        timeout_s: longest wait for the other ranks, and for one tensor, in seconds.

    Raises:
        CheckpointError: another rank did not come in time.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, address: str, timeout_s: float
    ) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = self._timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        self._store = store  # the trainer serves it as long as it lives
        try:
            self._group: dist.ProcessGroupGloo | None = dist.ProcessGroupGloo(
                PrefixStore(PREFIX, store), rank, world_size, options
            )
        except RuntimeError as error:
            raise CheckpointError(
                f"rank {rank} of {world_size} did not meet the other ranks in {timeout_s:g} s; "
                f"compare rank_offset and world_size: {_first_line(error)}"
            ) from None

    def broadcast(self, data_B: Tensor, name: str) -> None:
        """Send the bytes from the trainer to all others, in place.

        Args:
            data_B: [B] uint8 on the CPU; equal sizes on all ranks.
            name: of the tensor, for messages.

        Raises:
            CheckpointError: a rank is gone, or the bytes did not come in time; the group is
                useless then.
        """
        assert data_B.dtype == torch.uint8 and data_B.dim() == 1, "bytes"
        if self._group is None:
            raise CheckpointError("the group of the trainer is closed; join again")
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = TRAINER, 0, self._timeout
        try:
            self._group.broadcast([data_B], options).wait()  # type: ignore[attr-defined]
        except RuntimeError as error:
            self.close()
            raise CheckpointError(
                f"the broadcast of tensor {name[:200]!r} broke off: {_first_line(error)}"
            ) from None

    def close(self) -> None:
        """Leave; the others' waits for this rank end with an error."""
        self._group = None


def join_group(
    host: str, port: int, rank: int, world_size: int, timeout_s: float
) -> BroadcastGroup:
    """Join the group of a trainer, whose store is at an address.

    Raises:
        CheckpointError: the trainer, or another rank, did not come in time.
    """
    address = _own_address(host, port, timeout_s)
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(host, port, world_size, False, timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"no store of a trainer at {host}:{port}: {_first_line(error)}"
        ) from None
    return BroadcastGroup(store, rank, world_size, address, timeout_s)


def lead_group(
    listening: socket.socket, address: str, world_size: int, timeout_s: float
) -> BroadcastGroup:
    """Make the group as its trainer, on a listening socket; returns once all ranks have come.

    Raises:
        CheckpointError: another rank did not come in time.
    """
    store = TCPStore(
        address,
        listening.getsockname()[1],
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return BroadcastGroup(store, TRAINER, world_size, address, timeout_s)


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes [B] of a tensor, row-major, on the CPU; a view where the tensor allows it."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _own_address(host: str, port: int, timeout_s: float) -> str:
    """The address under which this node reaches the trainer."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=timeout_s) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise CheckpointError(
                    f"no trainer listens at {host}:{port}: {error}; start its store first"
                ) from None
        time.sleep(_RETRY_S)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:300]
