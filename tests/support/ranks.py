"""Real ranks of a small group, each a process of its own, over gloo."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.distributed import TCPStore

from arriero.shards.collectives.mesh import Mesh
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.layout.dense import partition
from arriero.shards.model_config.dense import ModelConfig
from support.processes import context


def joined(
    rank: int, port: int, *, tp: int = 1, pp: int = 1, device: str = "cpu", timeout_s: float
) -> Mesh:
    """A rank's mesh, once all ranks are there."""
    model = ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "float32",
        }
    )
    parallel = ParallelConfig(tp=tp, pp=pp)
    part = partition(model, parallel)[rank]
    mesh = Mesh(part, parallel, device=torch.device(device), timeout_s=timeout_s)
    store = TCPStore("127.0.0.1", port, tp * pp, is_master=rank == 0, wait_for_workers=False)
    mesh.join(store, "127.0.0.1")
    return mesh


@contextmanager
def ranks(count: int, run: Callable[..., None], *args: object) -> Iterator[Queue[Any]]:
    """Processes that run `run(rank, port, told, *args)`; gives the queue that they tell."""
    told: Queue[Any] = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=run, args=(rank, port, told, *args)) for rank in range(count)
    ]
    for one in processes:
        one.start()
    try:
        yield told
    finally:
        for one in processes:
            one.kill()
            one.join()


def tell(told: Queue[Any], what: object) -> None:
    """Put it there, and see it off: the process may be killed next."""
    told.put(what)
    told.close()
    told.join_thread()
