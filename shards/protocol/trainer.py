"""Messages about weights that a trainer's process broadcasts: where to join, and what will come.

Knows the contents of a message; knows nothing of sockets, files and tensors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerAddress:
    """The broadcast group of a trainer, in which the trainer is rank 0.

    Attributes:
        host, port: of the trainer's `TCPStore`.
        first_rank: rank of the first slice of this replica group; the others follow.
        world_size: ranks of the broadcast group: the trainer and all slices.
        timeout_s: longest wait for the other ranks, and for one tensor, in seconds.
    """

    host: str
    port: int
    first_rank: int
    world_size: int
    timeout_s: float = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnouncedTensor:
    """A tensor that the trainer will broadcast.

    Attributes:
        name: of the tensor in the model folder.
        dtype: name of the torch dtype, such as "bfloat16".
        shape: of the whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
