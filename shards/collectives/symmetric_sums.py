"""Sums over the ranks of a tensor-parallel group through memory that their GPUs share.

`open_symmetric_sums` decides, the same on every rank of the group, whether the group sums so or by
NCCL. It asks first what can be known (one machine, a GPU for each rank, kernels), then makes the
memory by torch's symmetric memory, then sums a few rows both ways and compares them bit for bit.
One line of the log says what was decided and why.

Not run on GPUs yet: `ARRIERO_SYMMETRIC_MEMORY=0` leaves all sums to NCCL. Knows ranks, the store of
the rendezvous and torch's symmetric memory; knows nothing of models. Shape legend: T tokens, H
hidden size.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from arriero.kernels.rounded_rows import InputRows, Rounding
from arriero.kernels.symmetric_memory import PROGRAMS, SIGNAL_SLOTS, RankSums, SymmetricMemory
from arriero.shards.collectives.symmetric_sizes import (
    BUFFER_NBYTES,
    divides_rows,
    in_symmetric_memory,
    symmetric_nbytes,
)

T = TypeVar("T")
_log = logging.getLogger(__name__)

SWITCH = "ARRIERO_SYMMETRIC_MEMORY"
"""Environment variable; 0 turns symmetric memory off."""
REHEARSAL_POLLS = 1 << 20
"""Reads of a signal in a rehearsal, about a second: a start without signals ends with NCCL."""
REHEARSALS = ((1, 1024), (3, 1024), (PROGRAMS + 1, 1024), (1, 1024), (2, 1024))
"""Rows and columns of the sums that a start compares; both buffers are used more than once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The ranks of a tensor-parallel group, and how they reach each other.

    Attributes:
        rank: this rank in the group, from 0.
        size: number of ranks.
        name: key of the group in the store, the same on all its ranks.
        store: store of the rendezvous.
        group: process group of the ranks.
        host: address of this rank's machine.
        device: this rank's GPU.
    """

    rank: int
    size: int
    name: str
    store: Store
    group: dist.ProcessGroup
    host: str
    device: torch.device

    def gather(self, key: str, word: str) -> list[str]:
        """The words of all ranks; every rank calls this with the same keys in the same order."""
        prefix = f"symmetric memory/{self.name}/{key}"
        self.store.set(f"{prefix}/{self.rank}", word)
        return [self.store.get(f"{prefix}/{rank}").decode() for rank in range(self.size)]


class SymmetricSums:
    """Sums over the ranks of a group; every rank calls the same sums in the same order."""

    def __init__(self, kernels: RankSums, memory: SymmetricMemory, keeps: object) -> None:
        """Use memory that every rank can read.

        Args:
            kernels: sums on this device.
            memory: memory of all ranks.
            keeps: what the memory lives by.
        """
        self._kernels, self._memory, self._keeps = kernels, memory, keeps

    def takes(self, part_TH: Tensor) -> bool:
        """Whether the buffers hold the rows; else the sum is another's."""
        return in_symmetric_memory(len(part_TH), _row_nbytes(part_TH))

    def reduce(self, part_TH: Tensor) -> Tensor:
        """The sum of all ranks' parts, in rank order; see `RankSums.reduce`."""
        divides = self._divides(part_TH)
        return self._kernels.reduce(self._memory, part_TH, divides=divides)

    def add_rms_norm(
        self,
        part_TH: Tensor,
        x_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        rounding: Rounding | None = None,
    ) -> InputRows:
        """Add the sum to x, in place, and give the norm of x; see `RankSums.add_rms_norm`."""
        divides = self._divides(part_TH)
        return self._kernels.add_rms_norm(
            self._memory, part_TH, x_TH, weight_H, eps, divides=divides, rounding=rounding
        )

    def compile(self, device: torch.device) -> None:
        """Compile the sums of a rehearsal, which takes each rank a time of its own."""
        self._rehearsed(self._rehearsal_parts(device), 1)
        torch.cuda.synchronize(device)

    def rehearse(self, device: torch.device, reference: Callable[[Tensor], Tensor]) -> str:
        """Sum a few rows in both forms, and compare the sums bit for bit; all ranks at once.

        Args:
            device: this rank's GPU.
            reference: the sum by another way.

        Returns:
            What is wrong, on this rank; "" for nothing.
        """
        parts = self._rehearsal_parts(device)
        expected = [reference(part.clone()) for part, _ in parts]
        totals = self._rehearsed(parts, REHEARSAL_POLLS)
        wrong = sum(not torch.equal(*pair) for pair in zip(totals, expected, strict=True))
        return f"{wrong} of {len(parts)} sums of the rehearsal differ from NCCL's" if wrong else ""

    def _rehearsal_parts(self, device: torch.device) -> list[tuple[Tensor, bool]]:
        """This rank's parts, unlike those of the others, and whether the rows are divided."""
        generator = torch.Generator().manual_seed(self._memory.rank)
        return [
            (torch.randn(*shape, generator=generator).to(device), divides)
            for shape in REHEARSALS
            for divides in (False, True)
        ]

    def _rehearsed(self, parts: list[tuple[Tensor, bool]], most_polls: int) -> list[Tensor]:
        return [
            self._kernels.reduce(self._memory, part, divides=divides, most_polls=most_polls)
            for part, divides in parts
        ]

    def _divides(self, part_TH: Tensor) -> bool:
        return divides_rows(self._memory.size, len(part_TH), _row_nbytes(part_TH))


def open_symmetric_sums(
    ranks: Ranks, kernels: RankSums | None, reference: Callable[[Tensor], Tensor]
) -> SymmetricSums | None:
    """Sums over symmetric memory where all ranks of the group can have them; else None.

    Every rank of the group must call this; all get the same answer.

    Args:
        ranks: the ranks.
        kernels: sums of the backend; None where the backend has none.
        reference: the sum of all ranks' parts in rank order by NCCL, for the comparison.
    """
    facts = {"refusal": _refusal(ranks, kernels)} | _place(ranks)
    refusal = _disagreement([json.loads(word) for word in ranks.gather("facts", json.dumps(facts))])
    sums = None
    if not refusal:
        assert kernels is not None, "a rank without kernels has refused"
        sums, failure = _attempt(lambda: _share_memory(ranks, kernels))
        refusal = _first(ranks.gather("memory", failure))
    if not refusal:
        assert sums is not None, "no rank has failed"
        refusal = _rehearsal(ranks, sums, reference)
    if ranks.rank == 0:
        _log.info(
            "sums of %d tensor-parallel ranks: %s",
            ranks.size,
            f"NCCL ({refusal})" if refusal else "symmetric memory",
        )
    return None if refusal else sums


def _rehearsal(ranks: Ranks, sums: SymmetricSums, reference: Callable[[Tensor], Tensor]) -> str:
    """Why the sums of all ranks are not to be used; "" for nothing. The same on all ranks."""
    _, failure = _attempt(lambda: sums.compile(ranks.device))
    refusal = _first(ranks.gather("compiled", failure))
    if refusal:
        return refusal
    wrong, failure = _attempt(lambda: sums.rehearse(ranks.device, reference))
    return _first(ranks.gather("rehearsal", failure or wrong or ""))


def _refusal(ranks: Ranks, kernels: RankSums | None) -> str:
    """Why this rank cannot, as far as it knows alone; "" for nothing."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0"
    if kernels is None:
        return "the backend of the kernels has no such sums"
    if ranks.size > SIGNAL_SLOTS:
        return f"{ranks.size} ranks; at most {SIGNAL_SLOTS} have signals"
    count = torch.cuda.get_device_properties(ranks.device).multi_processor_count
    if count < PROGRAMS:
        return f"a GPU with {count} multiprocessors; {PROGRAMS} are needed"
    return ""


def _place(ranks: Ranks) -> dict[str, str]:
    """The machine and the GPU of this rank."""
    gpu = torch.cuda.get_device_properties(ranks.device).uuid
    return {"host": f"{ranks.host} {socket.gethostname()}", "gpu": str(gpu)}


def _disagreement(facts: Sequence[dict[str, str]]) -> str:
    """Why the ranks cannot; "" for nothing. The same on all ranks."""
    refusal = _first([fact["refusal"] for fact in facts])
    if refusal:
        return refusal
    if len({fact["host"] for fact in facts}) > 1:
        return "the ranks are on several machines"
    if len({fact["gpu"] for fact in facts}) < len(facts):
        return "several ranks have the same GPU"
    return ""


def _first(words: Sequence[str]) -> str:
    """The first rank's word that says something, with the rank; "" for none."""
    return next((f"rank {rank}: {word}" for rank, word in enumerate(words) if word), "")


def _attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """The result of `work`, or the text of its error: the other ranks wait for either."""
    try:
        return work(), ""
    except Exception as error:  # NCCL can sum after any error of torch, Triton or the driver
        text = str(error).strip().split("\n", 1)[0]
        return None, f"{type(error).__name__}: {text}"


def _share_memory(ranks: Ranks, kernels: RankSums) -> SymmetricSums:
    """Allocate this rank's block and learn the addresses of the others.

    Raises:
        RuntimeError: torch cannot share memory between these GPUs.
    """
    # Each rank sees its own GPU alone, as device 0. Torch takes equal numbers for equal GPUs
    # unless told otherwise; `_disagreement` has compared the GPUs themselves.
    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    import torch.distributed._symmetric_memory as symmetric_memory

    nbytes, device = symmetric_nbytes(), torch.device("cuda", torch.cuda.current_device())
    block = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
    block.zero_()  # signals begin at 0
    torch.cuda.synchronize(ranks.device)
    handle: Any = symmetric_memory.rendezvous(block, ranks.group)
    blocks = [
        handle.get_buffer(rank, (nbytes,), torch.uint8).data_ptr() for rank in range(ranks.size)
    ]
    if blocks[ranks.rank] != block.data_ptr():
        raise RuntimeError("the shared memory begins at another address than the block")
    memory = SymmetricMemory(
        address_N=torch.tensor(blocks, dtype=torch.int64).to(ranks.device),
        epoch_P=torch.zeros(PROGRAMS, dtype=torch.int64, device=ranks.device),
        rank=ranks.rank,
        size=ranks.size,
        buffer_nbytes=BUFFER_NBYTES,
    )
    return SymmetricSums(kernels, memory, (block, handle))


def _row_nbytes(part_TH: Tensor) -> int:
    return part_TH.shape[1] * part_TH.element_size()
