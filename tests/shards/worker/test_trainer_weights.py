"""Weights that a trainer broadcasts: tokens, refusals, a trainer that dies in the middle."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from arriero.shards.checkpoint.overlay import open_weights
from arriero.shards.collectives.broadcast_group import bytes_of, lead_group
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.holds import Change, HoldStatus, Kind
from arriero.shards.errors import CheckpointError
from arriero.shards.protocol.trainer import AnnouncedTensor, TrainerAddress
from support.groups import Group, running
from support.models import tiny_llama
from support.processes import context

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, seed=1, ignore_eos=True)
PROMPTS = [[7, 3, 9, 11], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [99]]
TIMEOUT_S = 4.0
HOST = "127.0.0.1"


def config_of(path: Path, tp: int) -> GroupConfig:
    return GroupConfig(
        model_path=str(path), tp=tp, dtype="float32", num_blocks=100, max_sequences=4, block_size=8
    )


def tokens_of(group: Group) -> list[list[int]]:
    return [answer.tokens for answer in group.generate(PROMPTS, GREEDY)]


def announced(tensors: dict[str, Tensor]) -> tuple[AnnouncedTensor, ...]:
    return tuple(
        AnnouncedTensor(name=name, dtype=str(x.dtype).removeprefix("torch."), shape=tuple(x.shape))
        for name, x in tensors.items()
    )


def change(group: Group, wanted: Change) -> HoldStatus:
    return group.engine.change(wanted).result(timeout=60)


def plain_trainer(port: int, size: int, weights: Sequence[Tensor]) -> None:
    """A trainer that has torch alone, as in docs/weights.md."""
    store = TCPStore(HOST, port, size, is_master=True, wait_for_workers=False)
    timeout = timedelta(seconds=TIMEOUT_S)
    group = dist.ProcessGroupGloo(PrefixStore("arriero-weights", store), 0, size, timeout)
    for tensor in weights:
        data_B = tensor.contiguous().reshape(-1).view(torch.uint8)
        group.broadcast([data_B], dist.BroadcastOptions()).wait()


def trainer(listening: socket.socket, size: int, weights: Sequence[Tensor], dies: bool) -> None:
    """The trainer's process: sends all tensors, or ends suddenly after them."""
    torch.set_num_threads(1)
    group = lead_group(listening, HOST, size, TIMEOUT_S)
    for number, tensor in enumerate(weights):
        group.broadcast(bytes_of(tensor), str(number))
    if dies:
        os._exit(9)


class Trainer:
    """A trainer in a thread, or in a process that dies after the first tensors."""

    def __init__(
        self,
        group: Group,
        tp: int,
        weights: Sequence[Tensor],
        *,
        dies: bool = False,
        plain: bool = False,
    ) -> None:
        listening = socket.create_server((HOST, 0))
        address = TrainerAddress(
            host=HOST,
            port=listening.getsockname()[1],
            first_rank=1,
            world_size=1 + tp,
            timeout_s=TIMEOUT_S,
        )
        work = (listening, 1 + tp, weights, dies)
        self._runs: threading.Thread | BaseProcess
        if dies:
            self._runs = context.Process(target=trainer, args=work)
        elif plain:
            listening.close()
            work_of_plain = (address.port, 1 + tp, weights)
            self._runs = threading.Thread(target=plain_trainer, args=work_of_plain)
        else:
            self._runs = threading.Thread(target=trainer, args=work)
        self._runs.start()
        if dies:
            listening.close()
        change(group, Change(kind=Kind.JOIN, trainer=address))

    def join(self) -> None:
        self._runs.join(60)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_tokens_are_those_of_a_fresh_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp: int
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for seed, name in enumerate(("a", "b")):
        tiny_llama(tmp_path / name, seed=seed)
    new = load_file(tmp_path / "b" / "model.safetensors")
    spool = tmp_path / "spool" / "tiny"
    with running(config_of(tmp_path / "b", 1)) as group:
        fresh = tokens_of(group)
    with running(config_of(tmp_path / "a", tp)) as group:
        group.engine.name_weights("first", (), lambda digest: digest.encode())
        before = tokens_of(group)
        assert before != fresh
        name = "model.layers.1.mlp.up_proj.weight"
        file = str(spool / "1" / "part-1.safetensors")

        # refused announcements change nothing, and receive nothing
        for tensors, problem in (
            ({"model.layers.9.mlp.up_proj.weight": new[name]}, r"layers\.9.*no tensor"),
            ({name: new[name][:-1]}, rf"{name}.*shape"),
            ({name: new[name].to(torch.int32)}, rf"{name}.*dtype"),
        ):
            wanted = Change(kind=Kind.ANNOUNCE, tensors=announced(tensors), file=file)
            with pytest.raises(CheckpointError, match=problem):
                change(group, wanted)
        receive = Change(kind=Kind.RECEIVE, tensors=announced(new), file=file)
        with pytest.raises(CheckpointError, match="in no group of a trainer"):
            change(group, receive)
        assert not list((tmp_path / "spool").rglob("*.safetensors"))

        # a trainer that dies after some tensors
        first = Trainer(group, tp, list(new.values())[:3], dies=True)
        change(group, Change(kind=Kind.ANNOUNCE, tensors=announced(new), file=file))
        started = time.monotonic()
        with pytest.raises(CheckpointError, match=r"broadcast of tensor .* broke off"):
            change(group, receive)
        assert time.monotonic() - started < TIMEOUT_S + 2.0
        first.join()
        assert tokens_of(group) == before and group.engine.holds.digest == "first"

        # the next one sends everything
        second = Trainer(group, tp, list(new.values()))
        file = str(spool / "2" / "part-1.safetensors")
        change(group, Change(kind=Kind.ANNOUNCE, tensors=announced(new), file=file))
        assert [folder.name for folder in spool.iterdir()] == ["2"], "the broken one is deleted"
        state = change(group, Change(kind=Kind.RECEIVE, tensors=announced(new), file=file))
        assert state.whole and tokens_of(group) == before
        second.join()
        state = change(group, Change(kind=Kind.PUSH, sources=(str(spool / "2"),)))
        assert tokens_of(group) == fresh
        # one tensor more, on top
        extra = {name: load_file(tmp_path / "a" / "model.safetensors")[name]}
        third = Trainer(group, tp, list(extra.values()), plain=True)
        file = str(spool / "3" / "part-1.safetensors")
        sources = (str(spool / "2"),)
        wanted = Change(kind=Kind.ANNOUNCE, tensors=announced(extra), file=file, sources=sources)
        change(group, wanted)
        wanted = Change(kind=Kind.RECEIVE, tensors=announced(extra), file=file, sources=sources)
        state = change(group, wanted)
        third.join()
        assert not state.whole
        change(group, Change(kind=Kind.PUSH, sources=(*sources, str(spool / "3"))))
        mixed = tokens_of(group)
    tiny_llama(tmp_path / "mixed")
    save_file({**new, **extra}, tmp_path / "mixed" / "model.safetensors")
    with running(config_of(tmp_path / "mixed", 1)) as group:
        assert tokens_of(group) == mixed


def test_a_node_without_the_files_says_so(tmp_path: Path) -> None:
    """A group that starts where no slice has received the weights."""
    tiny_llama(tmp_path / "a")
    with pytest.raises(CheckpointError, match="spool/2: is not on this node"):
        open_weights(str(tmp_path / "a"), (str(tmp_path / "spool" / "2"),))
