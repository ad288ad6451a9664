"""Torch's symmetric memory over the simulated device: a mapped file for each rank.

Ranks are processes of one machine, so that what a rank writes is there for all. Knows files and
torch's names; knows nothing of kernels.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from support.fake_cuda.tensors import DeviceTensor, plain_memory

MULTIPROCESSORS = 132


class Handle:
    """The blocks of all ranks, mapped into this process."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._blocks = blocks

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype) -> DeviceTensor:
        """The block of a rank."""
        with _disable_current_modes():
            return DeviceTensor(self._blocks[rank].view(dtype)[: sizes[0]])


def _mapped(path: str, nbytes: int) -> Tensor:
    return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)


@contextmanager
def shared_blocks() -> Iterator[None]:
    """Let `empty` and `rendezvous` of symmetric memory work between simulated devices."""
    paths: dict[int, str] = {}

    def empty(nbytes: int, *, dtype: torch.dtype, device: torch.device) -> DeviceTensor:
        assert dtype == torch.uint8 and torch.device(device).type == "cuda"
        handle, path = tempfile.mkstemp(prefix="arriero-block-")
        os.close(handle)
        with _disable_current_modes():
            block = DeviceTensor(_mapped(path, nbytes))
        paths[block.data_ptr()] = path
        return block

    def rendezvous(block: DeviceTensor, group: dist.ProcessGroup) -> Handle:
        own = paths[block.data_ptr()]
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        with _disable_current_modes():
            all_paths: list[Any] = [None] * size
            dist.all_gather_object(all_paths, own, group=group)
            blocks = [
                plain_memory(block) if other == rank else _mapped(path, block.numel())
                for other, path in enumerate(all_paths)
            ]
            dist.all_gather_object([None] * size, rank, group=group)  # all have mapped all
        os.unlink(own)
        return Handle(blocks)

    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS, uuid=str(os.getpid()))
    from arriero.kernels import symmetric_memory as layout
    from arriero.shards.collectives import symmetric_sums as product

    with ExitStack() as stack:
        for place, name, value in (
            (symmetric_memory, "empty", empty),
            (symmetric_memory, "rendezvous", rendezvous),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (product, "REHEARSALS", ((1, 24), (3, 16))),
            (layout, "PROGRAMS", 2),  # a program takes the interpreter long
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        yield
