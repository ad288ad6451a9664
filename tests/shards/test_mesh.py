"""Real ranks over gloo: what is handed on is let go."""

from __future__ import annotations

import multiprocessing
import socket
import weakref
from multiprocessing.queues import Queue

import torch
from torch.distributed import TCPStore

from arriero.shards.group import GroupConfig
from arriero.shards.mesh import MOST_SENDING, Mesh
from arriero.shards.models.config import ModelConfig
from arriero.shards.partition import partition

STEPS = 60


def run_rank(rank: int, port: int, told: Queue[tuple[int, float]]) -> None:
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
    part = partition(model, GroupConfig(model_path="", pp=2))[rank]
    mesh = Mesh(part, tp=1, pp=2, device=torch.device("cpu"), timeout_s=30)
    store = TCPStore("127.0.0.1", port, 2, is_master=rank == 0, wait_for_workers=False)
    mesh.join(store, "127.0.0.1")
    if rank == 0:
        sent = []
        for step in range(STEPS):
            x_TH = torch.full((4, 32), float(step))
            sent.append(weakref.ref(x_TH))
            mesh.send_hidden(x_TH)
            del x_TH
        told.put((sum(one() is not None for one in sent), 0.0))
    else:
        x_TH = torch.empty(4, 32)
        total = 0.0
        for _ in range(STEPS):
            mesh.recv_hidden(x_TH)
            total += float(x_TH[0, 0])
        told.put((-1, total))
    told.close()
    told.join_thread()


def test_activations_are_let_go_once_they_are_out() -> None:
    context = multiprocessing.get_context("spawn")
    told: Queue[tuple[int, float]] = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = [context.Process(target=run_rank, args=(rank, port, told)) for rank in range(2)]
    for one in ranks:
        one.start()
    try:
        heard = dict(told.get(timeout=90) for _ in ranks)
    finally:
        for one in ranks:
            one.join(20)
            one.kill()
            one.join()
    assert heard.pop(-1) == sum(range(STEPS))
    (kept,) = heard
    assert kept <= MOST_SENDING
