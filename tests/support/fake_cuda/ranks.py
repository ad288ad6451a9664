"""Several ranks on simulated devices, each a process of its own, with gloo in place of NCCL.

Knows `torch.distributed` and how the product starts slices; knows nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
                ledger.recording.append(Recorded(lambda: discard(collective(*args, **kwargs))))
            return result

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "init_process_group", init_process_group))
        for name in COLLECTIVES:
            patched = over_memory(name, getattr(dist, name))
            stack.enter_context(mock.patch.object(dist, name, patched))
        yield


@contextmanager
def simulated_slices() -> Iterator[None]:
    """Slices that `spawn_group` starts meanwhile run on a simulated device each."""
    from arriero.shards.leader import remote_executor as executor

    with mock.patch.object(executor, "_run_child", child):
        yield


def child(rank: int, ticket: Any, parent: int) -> None:  # noqa: ANN401
    """What a slice's process runs in place of `executor._run_child`."""
    from support import triton_interpreter

    triton_interpreter.install()  # before anything imports the kernels
    from support.fake_cuda.runtime import simulated

    with simulated():
        from arriero.shards.leader import remote_executor as executor

        executor._run_child(rank, ticket, parent)
