"""Collectives of one slice: tensor-parallel sums, sends between pipeline stages, tokens.

Over `torch.distributed`: gloo on CPU, NCCL on CUDA; sums of steps over memory that the GPUs of a
machine share, where they can (`symmetric_sums`). Knows ranks and tensors; knows nothing of
models or plans.

Sums are taken in rank order, so that a row's sum does not depend on its position in the batch
(a ring all-reduce adds different parts of a buffer in different orders).

Shape legend: T tokens, H hidden size, R rows, V vocabulary rows of the rank.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from arriero.kernels.ops import Ops
from arriero.kernels.rounded_rows import InputRows, Rounding
from arriero.kernels.symmetric_memory import RankSums
from arriero.shards.collectives.all_to_all import (
    DirectExchange,
    Exchange,
    TwoLevelExchange,
    topology,
)
from arriero.shards.collectives.beside import Beside, Pending
from arriero.shards.collectives.divided_sum import divides_sum
from arriero.shards.collectives.half_steps import first_half
from arriero.shards.collectives.symmetric_sums import (
    Ranks,
    SymmetricSums,
    open_symmetric_sums,
)
from arriero.shards.collectives.watchdog import Mark, Watchdog
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.layout.parts import AnyPart

TIMEOUT_S = 120.0
MOST_SENDING = 8
"""Most steps that the next stage may lag behind in receiving activations."""


class Mesh:
    """One rank's view of its group's mesh: `pp` stages of `dp` x `tp` ranks."""

    def __init__(
        self,
        part: AnyPart,
        parallel: ParallelConfig,
        *,
        device: torch.device,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Describe the mesh; `join` connects it.

        Args:
            part: part of the model on this rank.
            parallel: mesh of the group.
            device: device of the tensors.
            timeout_s: longest wait for another rank, in seconds; a longer wait fails the group.
        """
        self.part, self.parallel, self.device = part, parallel, device
        self.tp, self.pp, self.dp = parallel.tp, parallel.pp, parallel.dp
        self.stage_size = parallel.stage_size
        mark = _Marks(device) if device.type == "cuda" and parallel.world_size > 1 else None
        self.watchdog = Watchdog(part.rank, timeout_s, self._abort, mark)
        self._timeout = timedelta(seconds=timeout_s)
        self.beside = Beside(device)
        self.add_parts: Callable[[Tensor], Tensor] = added
        self._rank_sums: RankSums | None = None
        self._symmetric: SymmetricSums | None = None
        self._tp_group: dist.ProcessGroup | None = None
        self._stage_group: dist.ProcessGroup | None = None
        self._exchange: Exchange | None = None
        self._exchange_groups: list[dist.ProcessGroup] = []
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    @property
    def _first(self) -> int:
        """Rank with tp rank 0 in this rank's tensor-parallel group."""
        return self.part.rank - self.part.tp_rank

    @property
    def samples(self) -> bool:
        """Whether this rank samples tokens: tp rank 0 of the last stage."""
        return self.part.last_stage and self.part.tp_rank == 0

    def use(self, ops: Ops) -> None:
        """Take the ops' kernels for sums; before `join`."""
        self.add_parts, self._rank_sums = ops.add_parts, ops.rank_sums

    def join(self, store: Store, host: str) -> None:
        """Join the other ranks of the group through `store`; every rank must call this.

        Args:
            store: store of the rendezvous.
            host: address of this rank; a loopback address also binds the sockets to loopback.
        """
        if host.startswith("127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        world = self.parallel.world_size
        dist.init_process_group(
            backend,
            store=store,
            rank=self.part.rank,
            world_size=world,
            timeout=self._timeout,
            device_id=self._own_device(),
        )
        if 1 < self.tp < world:  # each gloo group has a thread that polls 100 times a second
            for first in range(0, world, self.tp):
                # new_group is collective: every rank creates every group
                ranks = list(range(first, first + self.tp))
                group = dist.new_group(ranks, timeout=self._timeout)
                if first == self._first:
                    self._tp_group = group

        if self.dp > 1:
            self._join_stages(store, host)
        if self.device.type == "cuda":
            self._connect()
            self.beside.open(store, self.part.rank, world)
            if self.tp > 1:
                self._symmetric = self._open_symmetric_sums(store, host)

    def _open_symmetric_sums(self, store: Store, host: str) -> SymmetricSums | None:
        ranks = Ranks(
            rank=self.part.tp_rank,
            size=self.tp,
            name=str(self._first),
            store=store,
            group=self._tp_group or dist.distributed_c10d._get_default_group(),
            host=host,
            device=self.device,
        )
        return open_symmetric_sums(ranks, self._rank_sums, self.reduce)

    def _own_device(self) -> torch.device | None:
        """The device that NCCL is to make its communicators on at once; None for gloo."""
        if self.device.type != "cuda":
            return None
        return torch.device("cuda", torch.cuda.current_device())

    def _connect(self) -> None:
        """Use each group and each pair of ranks once, so that no step waits for a communicator.

        NCCL makes them at their first use, which over many GPUs takes longer than a hang may.
        """
        word = torch.zeros(1, device=self.device)
        dist.all_reduce(word)
        for group in (self._tp_group, *self._exchange_groups):
            if group is not None:
                dist.all_reduce(word, group=group)
        if self.tp > 1:  # logits go to tp rank 0
            if self.part.tp_rank:
                dist.send(word, self._first, group=self._tp_group)
            else:
                for other in range(1, self.tp):
                    dist.recv(word, self._first + other, group=self._tp_group)
        if not self.part.first_stage:
            dist.recv(word, self.part.rank - self.stage_size)
        if not self.part.last_stage:
            dist.send(word, self.part.rank + self.stage_size)
        torch.cuda.synchronize(self.device)

    def _join_stages(self, store: Store, host: str) -> None:
        """Create the groups in which each stage's ranks exchange rows for experts."""
        world, size = self.parallel.world_size, self.stage_size
        store.set(f"host/{self.part.rank}", host)
        hosts = [store.get(f"host/{rank}").decode() for rank in range(world)]
        for first in range(0, world, size):
            ranks = list(range(first, first + size))
            stage = dist.new_group(ranks, timeout=self._timeout)
            per_node = topology(hosts[first : first + size])
            nodes = [ranks[i : i + per_node] for i in range(0, size, per_node or size)]
            rails = [ranks[local_rank::per_node] for local_rank in range(per_node)]
            of_nodes, of_rails = (
                [
                    (members, dist.new_group(members, timeout=self._timeout))
                    for members in groups
                    if per_node
                ]
                for groups in (nodes, rails)
            )
            if self.part.rank not in ranks:
                continue
            self._stage_group = stage
            self._exchange = DirectExchange(self.stage_rank, stage)
            self._exchange_groups = [stage]
            if per_node:
                node, rail = (
                    next(group for ranks, group in groups if self.part.rank in ranks)
                    for groups in (of_nodes, of_rails)
                )
                self._exchange = TwoLevelExchange(self.stage_rank, per_node, node, rail)
                self._exchange_groups += [node, rail]

    @property
    def stage_rank(self) -> int:
        """Number of this rank in its stage."""
        return self.part.rank % self.stage_size

    @property
    def stage_group(self) -> dist.ProcessGroup:
        """Process group of this stage."""
        assert self._stage_group is not None, "joined, with data-parallel ranks"
        return self._stage_group

    @property
    def exchange(self) -> Exchange:
        """Exchange of rows over the ranks of this stage."""
        assert self._exchange is not None, "joined, with data-parallel ranks"
        return self._exchange

    def leave(self) -> None:
        """Leave the process group."""
        self._sending.clear()
        self._symmetric = None
        self.beside.close()
        self.watchdog.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _abort(self) -> None:
        """Abort every wait of this process for another rank, in each of its process groups.

        Raises:
            RuntimeError: a group cannot be aborted (gloo); all others are aborted.
        """
        default = dist.distributed_c10d._get_default_group()
        groups = {default, self._tp_group, self._stage_group, *self._exchange_groups}
        errors: list[RuntimeError] = []
        for group in groups:
            try:
                if group is not None:
                    group.abort()
            except RuntimeError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def reduce(self, x_TH: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks, in rank order; may work in place."""
        if self.tp == 1:
            return x_TH
        if self._symmetric is not None and self._symmetric.takes(x_TH):
            with self.watchdog.watch("all-reduce"):
                return self._symmetric.reduce(x_TH)
        if self.tp == 2:  # a + b equals b + a: any algorithm keeps the order
            with self.watchdog.watch("all-reduce"):
                dist.all_reduce(x_TH, group=self._tp_group)
            return x_TH
        with self.watchdog.watch("all-reduce"):
            if divides_sum(self.tp, len(x_TH), x_TH.shape[1] * x_TH.element_size()):
                return self._divided_sum(x_TH)
            gathered = x_TH.new_empty((self.tp * x_TH.shape[0], *x_TH.shape[1:]))
            all_gather(gathered, x_TH.contiguous(), self._tp_group)
        return self.add_parts(gathered.view(self.tp, *x_TH.shape))

    def first_half(self, num_rows: int, row_nbytes: int, *, routed: bool) -> int:
        """Rows of the first half of a step; 0 for a whole step. See `HalfSums`."""
        return first_half(self.tp, num_rows, row_nbytes, routed=routed) if self.beside.on else 0

    def begin_reduce(self, part_TH: Tensor) -> Pending[Tensor]:
        """`reduce` beside what the current stream does next. See `HalfSums`."""
        return self.beside.begin(lambda: self.reduce(part_TH))

    def reduce_norm(
        self,
        part_TH: Tensor,
        x_TH: Tensor,
        weight_H: Tensor,
        eps: float,
        rounding: Rounding | None = None,
    ) -> InputRows | None:
        """Add the sum over the tensor-parallel ranks to x, in place, and give the norm of x.

        With `rounding` the norm is rounded for the product that reads it. None, without any effect,
        where no kernel does all of it; then `reduce` is for the sum.
        """
        sums = self._symmetric
        if sums is None or x_TH.dtype != part_TH.dtype or not sums.takes(part_TH):
            return None
        with self.watchdog.watch("all-reduce"):
            return sums.add_rms_norm(part_TH, x_TH, weight_H, eps, rounding)

    def _divided_sum(self, x_TH: Tensor) -> Tensor:
        """The sum in two exchanges: each rank adds a part of the rows, and all gather the sums.

        A rank receives 2 (tp - 1) / tp times the bytes of the rows, in place of tp - 1 times.
        """
        num_rows, hidden = x_TH.shape
        rows = -(-num_rows // self.tp)
        if rows * self.tp > num_rows:  # rows beyond the last are exchanged, and nobody reads them
            x_TH = torch.cat([x_TH, x_TH[: rows * self.tp - num_rows]])
        parts = x_TH.new_empty((self.tp, rows, hidden))
        dist.all_to_all_single(parts.view(-1, hidden), x_TH.contiguous(), group=self._tp_group)
        total = x_TH.new_empty((rows * self.tp, hidden))
        all_gather(total, self.add_parts(parts), self._tp_group)
        return total[:num_rows]

    def gather_logits(self, logits_RV: Tensor, sizes: list[int]) -> Tensor | None:
        """Join the ranks' vocabulary rows on tp rank 0: [R, sum of `sizes`]; None elsewhere."""
        if self.tp == 1:
            return logits_RV
        first = self._first
        if self.part.tp_rank:
            with self.watchdog.watch("send of logits"):
                dist.send(logits_RV.contiguous(), first, group=self._tp_group)
            return None
        rows = logits_RV.shape[0]
        parts = [logits_RV]
        for i in range(1, self.tp):
            part = torch.empty((rows, sizes[i]), dtype=logits_RV.dtype, device=logits_RV.device)
            with self.watchdog.watch(f"logits from rank {first + i}"):
                dist.recv(part, first + i, group=self._tp_group)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def share_tokens(self, tokens_R: Tensor) -> None:
        """Broadcast the sampled tokens (int32, in place) in a single-stage group."""
        if self.tp > 1 and self.pp == 1:
            with self.watchdog.watch("broadcast of tokens"):
                dist.broadcast(tokens_R, self._first, group=self._tp_group)

    def share_drafts(self, tokens_R: Tensor) -> None:
        """Broadcast drafted tokens (int32, in place) from tp rank 0 of the last stage."""
        if self.tp > 1:
            with self.watchdog.watch("broadcast of drafts"):
                dist.broadcast(tokens_R, self._first, group=self._tp_group)

    def send_hidden(self, x_TH: Tensor) -> None:
        """Send activations to the next stage; keeps a reference to `x_TH` until sent.

        Returns at once unless the next stage is `MOST_SENDING` steps behind.
        """
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        while len(self._sending) >= MOST_SENDING:  # gloo completes a send only in wait()
            with self.watchdog.watch("send of activations to the next stage"):
                self._sending.popleft()[0].wait()
        work = dist.isend(x_TH, self.part.rank + self.stage_size)
        if work is not None:
            self._sending.append((work, x_TH))

    def recv_hidden(self, x_TH: Tensor) -> None:
        """Receive the activations of the last stage into `x_TH`."""
        with self.watchdog.watch("activations from the stage before"):
            dist.recv(x_TH, self.part.rank - self.stage_size)


def added(parts_NTH: Tensor) -> Tensor:
    """The sum of parts in their order, in place of the first; see `Ops.add_parts`."""
    total = parts_NTH[0]
    for part in parts_NTH[1:]:
        total += part
    return total


def all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup | None) -> None:
    """Gather `x` of all ranks into `out`, one after another; the name is new in torch 2.13."""
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(out, x, group=group)


class _Marks:
    """Marks in the current stream of a CUDA device, which waits for each queued collective."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
