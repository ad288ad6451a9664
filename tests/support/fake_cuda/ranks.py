"""Several ranks on simulated devices, each a process of its own, with gloo in place of NCCL.

Knows `torch.distributed` and how the product starts slices; knows nothing of what they compute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from support.fake_cuda.ledger import Ledger, Recorded
from support.fake_cuda.tensors import plain_memory

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


@contextmanager
def gloo_for_nccl(ledger: Ledger) -> Iterator[None]:
    """Let process groups that ask for NCCL be gloo's, over the memory behind the tensors.

    Each collective is counted in `ledger.collectives`, by name and the ranks of its group.
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
            args, kwargs = pytree.tree_map(plain_memory, (args, kwargs))
            with _disable_current_modes():
                result = collective(*args, **kwargs)
            if ledger.recording is not None:
                ledger.recording.append(
                    Recorded(lambda: discard(collective(*args, **kwargs)), name)
                )
            return result

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "init_process_group", init_process_group))
        for name in COLLECTIVES:
            if not hasattr(dist, name):  # a name of newer torch
                continue
            patched = over_memory(name, getattr(dist, name))
            stack.enter_context(mock.patch.object(dist, name, patched))
        yield


@contextmanager
def simulated_slices(reports: Path | None = None) -> Iterator[None]:
    """Slices that `spawn_group` starts meanwhile run on a simulated device each.

    Args:
        reports: folder for a file RANK.json of each rank, written when the rank ends: what its
            device counted since it was ready to serve (see `Ledger`).
    """
    from arriero.shards.leader import spawned_group as executor

    with mock.patch.object(executor, "_run_child", partial(child, reports=reports)):
        yield


def child(rank: int, ticket: Any, *, reports: Path | None = None) -> None:  # noqa: ANN401
    """What a slice's process runs in place of `executor._run_child`."""
    from support import triton_interpreter

    triton_interpreter.install()  # before anything imports the kernels
    from support.fake_cuda.runtime import simulated

    with simulated() as ledger:
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
                }
                (reports / f"{rank}.json").write_text(json.dumps(counts))
