"""A trainer's push through HTTP to two groups: gateway's paths, operator, leaders, slices."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from safetensors.torch import load_file
from torch import Tensor

from arriero.cluster.control import received_folders, weight_admin
from arriero.cluster.control.desired_state import ModelState, OperatorState, Revision
from arriero.cluster.control.hold_calls import _state
from arriero.cluster.control.trainer_updates import ACTIONS, TrainerUpdates
from arriero.cluster.control.weight_admin import WeightAdmin
from arriero.cluster.registry.snapshot import GroupEntry, RegistrySnapshot
from arriero.cluster.replica.weight_admin import WeightAdminHandler
from arriero.cluster.spec.model import ModelSpec
from arriero.router.client.trainer import TrainerGroup
from arriero.router.http import errors
from arriero.router.http.development import add_development
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.shards.collectives.broadcast_group import bytes_of
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.errors import CheckpointError, InvalidRequest
from arriero.shards.protocol import wire
from support.groups import Group, running
from support.models import tiny_llama

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, seed=1, ignore_eos=True)
PROMPTS = [[7, 3, 9, 11], [99]]
NAME = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.1.mlp.up_proj.weight"
TIMEOUT_S = 3.0


def tokens_of(group: Group) -> list[list[int]]:
    return [answer.tokens for answer in group.generate(PROMPTS, GREEDY)]


def config_of(path: Path) -> GroupConfig:
    return GroupConfig(
        model_path=str(path), dtype="float32", num_blocks=100, max_sequences=4, block_size=8
    )


class Operator:
    """A `WeightAdmin` over the leaders of real groups, without Ray."""

    def __init__(self, path: Path, groups: Mapping[str, Group]) -> None:
        self.groups, self.model = groups, ModelSpec(name="m", path=str(path))
        self.state = OperatorState({}, True)
        first = Revision(1, self.model.model_dump(mode="json"), "d")
        self.state.models["m"] = ModelState(len(groups), [first])
        self.spec = SimpleNamespace(link_tls=None)
        self.admin = WeightAdmin(self, self)  # type: ignore[arg-type]
        self.updates = TrainerUpdates(self.admin)
        speculation = SpeculationConfig()
        self.leaders = {
            name: WeightAdminHandler(group.engine, speculation) for name, group in groups.items()
        }

    def settings(self, name: str) -> ModelSpec:
        return self.model

    def save(self) -> None:
        pass

    @property
    def entries(self) -> RegistrySnapshot:
        entries = [
            GroupEntry(group_id=f"m-{name}.1", model="m", address=name, slice_pids=(1,))
            for name in self.groups
        ]
        return RegistrySnapshot(
            version=1, groups=tuple(entries), gateways=(), progress={}, failures={}
        )

    @property
    def snapshot(self) -> Any:  # noqa: ANN401
        async def remote() -> RegistrySnapshot:
            return self.entries

        return SimpleNamespace(remote=remote)

    @property
    def note(self) -> Any:  # noqa: ANN401
        async def remote(*_: str) -> None:
            return None

        return SimpleNamespace(remote=remote)

    async def ask(
        self,
        leader: tuple[str, str],
        context: object,
        action: str,
        arguments: object,
        *_: object,
    ) -> object:
        return await self.leaders[leader[0]].answer(memoryview(wire.encode(arguments)))

    async def develop(
        self, authorization: str, action: str, fields: Mapping[str, str | int]
    ) -> dict[str, Any]:
        assert authorization == "Bearer right"
        if action in ACTIONS:
            return {"text": await self.updates.run(action, fields)}
        request = pb.WeightsRequest(action=action, model=str(fields.get("model", "")))
        return _state(await self.admin.weights(request))

    async def keep_assigning(self) -> None:
        while True:
            self.admin.assign(self.entries)
            await asyncio.sleep(0.02)


@contextmanager
def served(operator: Operator) -> Iterator[str]:
    """The gateway's paths over HTTP; gives the address."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(operator.keep_assigning())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)
    errors.install(app)
    add_development(app, operator.develop)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            threading.Event().wait(0.01)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_a_trainer_pushes_to_two_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("a", "b")):
        tiny_llama(tmp_path / name, seed=seed)
    new = load_file(tmp_path / "b" / "model.safetensors")
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(received_folders, "MEMORY", memory)
    monkeypatch.setattr(weight_admin.kv_store, "put", lambda *_: None)
    with contextlib.ExitStack() as stack:
        fresh = tokens_of(stack.enter_context(running(config_of(tmp_path / "b"))))
        groups = {n: stack.enter_context(running(config_of(tmp_path / "a"))) for n in ("x", "y")}
        for group in groups.values():
            group.engine.name_weights("first", (), lambda digest: digest.encode())
        operator = Operator(tmp_path / "a", groups)
        monkeypatch.setattr(weight_admin, "ask_leader", operator.ask)
        url = stack.enter_context(served(operator))
        before = tokens_of(groups["x"])
        trainer = stack.enter_context(TrainerGroup(url, "right", timeout_s=TIMEOUT_S))

        _refusals(url, trainer, new)
        _broken(trainer, new, monkeypatch)
        assert all(tokens_of(group) == before for group in groups.values())

        answer = trainer.push(new, weight_version="step-1")
        assert answer["version"] == 1 and answer["weight_version"] == "step-1"
        assert all(tokens_of(group) == fresh for group in groups.values())
        answer = trainer.push([(NAME, new[NAME].half())])  # a delta on top
        delta = groups["x"].engine.holds.sources
        assert answer["version"] == 2 and len(delta) == 2
        trainer.push(new)  # a whole version replaces all before
        sources = groups["y"].engine.holds.sources
        assert len(sources) == 1 and all(tokens_of(group) == fresh for group in groups.values())
        kept = {str(file.parent) for file in memory.rglob("*.safetensors")}
        assert kept == {*delta, *sources}, "what broke off is deleted"
        stored = operator.state.models["m"].weights
        assert stored is not None
        (folder,) = received_folders.folders_to_delete({"m": stored})
        assert folder == str(Path(sources[0]).parent)
        pushed = replace(stored, sources=("/models/step-400",))
        assert not received_folders.folders_to_delete({"m": pushed})


def _refusals(url: str, trainer: TrainerGroup, new: Mapping[str, Tensor]) -> None:
    """Refused by name, in the shapes of vLLM."""
    bad = {
        "model.layers.9.mlp.up_proj.weight": new[NAME],
        NAME: new[NAME][:-1],
        OTHER: new[OTHER].to(torch.int32),
    }
    problems = rf"layers\.9.*is no tensor.*{NAME}.*has shape.*{OTHER}.*has dtype"
    with pytest.raises(InvalidRequest, match=problems):
        trainer.push(bad)
    with httpx.Client(base_url=url, headers={"authorization": "Bearer right"}) as client:
        assert client.get("/get_world_size").json() == {"world_size": 2}
        info = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2}
        for path, body, problem in (
            ("/init_weight_transfer_engine", {"init_info": info}, "exceed world_size=2"),
            ("/init_weight_transfer_engine", {"init_info": info | {"packed": True}}, "packed"),
            ("/update_weights", {}, "either"),
            ("/finish_weight_update", {"weight_version": "1"}, "no tensor has come"),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 400 and problem in answer.text, answer.text


def _broken(
    trainer: TrainerGroup, new: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broadcast that breaks off in the middle."""

    def breaking(tensor: Tensor) -> Tensor:
        if tensor is new[NAME]:
            raise CheckpointError("the trainer ran out of luck")
        return bytes_of(tensor)

    with monkeypatch.context() as patch:
        patch.setattr("arriero.router.client.trainer.bytes_of", breaking)
        with pytest.raises(CheckpointError, match=r"broke off|luck"):
            trainer.push(new)
