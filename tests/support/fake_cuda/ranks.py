"""Several ranks on simulated devices, each a process of its own, with gloo in place of NCCL.

Knows `torch.distributed` and how the product starts slices; knows nothing of what they compute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from support.fake_cuda.ledger import Ledger, Recorded
from support.fake_cuda.streams import Event, Stream
from support.fake_cuda.tensors import DeviceTensor, plain_memory

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_to_all_single",
    "broadcast",
    "send",
    "recv",
    "isend",
    "irecv",
)


class _Work:
    """A collective under way: what the current stream queues after `wait` comes after it."""

    def __init__(self, work: dist.Work, done: Event) -> None:
        self._work, self._done = work, done

    def wait(self) -> None:
        self._work.wait()
        self._done.wait()

    def is_completed(self) -> bool:
        return self._work.is_completed()


@contextmanager
def gloo_for_nccl(ledger: Ledger) -> Iterator[None]:
    """Let process groups that ask for NCCL be gloo's, over the memory behind the tensors.

    Each collective is counted in `ledger.collectives`, by name and the ranks of its group, and
    uses its tensors on the current stream; with `async_op`, on a stream of the group.
    """
    init: Callable[..., Any] = dist.init_process_group

    def init_process_group(backend: str | None = None, **more: Any) -> None:  # noqa: ANN401
        if backend == "nccl":
            more.pop("device_id", None)
            backend = "gloo"
        init(backend, **more)

    def discard(result: object) -> None:
        """A replay has no use for a collective's result, whose tensors lie in place."""

    def over_memory(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            ranks = tuple(dist.get_process_group_ranks(kwargs.get("group") or dist.group.WORLD))
            ledger.collectives[name, ranks] += 1
            tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, DeviceTensor)]
            ledger.messages.append((name, ranks, sum(tensor.numel() for tensor in tensors)))
            stream = ledger.streams.current
            if kwargs.get("async_op"):  # NCCL's own stream
                stream = apart.setdefault(ranks, Stream())
                stream.wait_stream(ledger.streams.current)
            memories = [tensor.memory for tensor in tensors if tensor.memory is not None]
            with ledger.streams.on(stream):
                ledger.streams.use((), memories, name)
            args, kwargs = pytree.tree_map(plain_memory, (args, kwargs))
            with _disable_current_modes():
                result = collective(*args, **kwargs)
            if result is not None and kwargs.get("async_op"):
                result = _Work(result, stream.record_event())
            if ledger.recording is not None:
                ledger.recording.append(
                    Recorded(lambda: discard(collective(*args, **kwargs)), name)
                )
            return result

        return run

    apart: dict[tuple[int, ...], Stream] = {}

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "init_process_group", init_process_group))
        for name in COLLECTIVES:
            if not hasattr(dist, name):  # a name of newer torch
                continue
            patched = over_memory(name, getattr(dist, name))
            stack.enter_context(mock.patch.object(dist, name, patched))
        yield


@contextmanager
def simulated_slices(reports: Path | None = None, *, small_halves: bool = False) -> Iterator[None]:
    """Slices that `spawn_group` starts meanwhile run on a simulated device each.

    Args:
        reports: folder for a file RANK.json of each rank, written when the rank ends: what its
            device counted since it was ready to serve (see `Ledger`).
        small_halves: see `small_halves`.
    """
    from arriero.shards.leader import spawned_group as executor

    run = partial(child, reports=reports, small=small_halves)
    with mock.patch.object(executor, "_run_child", run):
        yield


@contextmanager
def small_halves(on: bool = True) -> Iterator[None]:
    """Let steps from 8 tokens on go in halves, whatever their bytes."""
    from arriero.shards.collectives import half_steps

    sizes = {"LEAST_ROWS": 8, "LEAST_ROUTED_ROWS": 8, "LEAST_NBYTES": 0, "ROWS_MULTIPLE": 4}
    with mock.patch.multiple(half_steps, **sizes) if on else nullcontext():
        yield


def child(
    rank: int,
    ticket: Any,  # noqa: ANN401
    *,
    reports: Path | None = None,
    small: bool = False,
) -> None:
    """What a slice's process runs in place of `executor._run_child`."""
    from support import triton_interpreter

    triton_interpreter.install()  # before anything imports the kernels
    from support.fake_cuda.runtime import simulated

    with simulated() as ledger, small_halves(small):
        from arriero.shards.leader import spawned_group as executor
        from arriero.shards.worker.cuda.runner import CudaRunner

        warm_up = CudaRunner.warm_up

        def counted(self: CudaRunner) -> None:
            warm_up(self)
            ledger.clear()  # what loading needed

        CudaRunner.warm_up = counted  # type: ignore[method-assign]  # this process ends soon
        try:
            executor._run_child(rank, ticket)
        finally:
            if reports is not None:
                counts = {
                    "waits": dict(ledger.waits),
                    "pageable": dict(ledger.pageable),
                    "captures": ledger.captures,
                    "replays": ledger.replays,
                    "compiles": dict(ledger.compiles),
                    "launches": dict(ledger.launches),
                    "collectives": [[name, n] for (name, _), n in ledger.collectives.items()],
                    "messages": ledger.messages,
                }
                (reports / f"{rank}.json").write_text(json.dumps(counts))
