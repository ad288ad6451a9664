"""Wrong specs and wishes of operators: the command, and what the answer must say."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from support.checkpoints_sparse import LLAMA_405B
from support.frontdoor import LLAMA_SPECIALS, make_tokenizer
from support.models import tiny_llama


def make_model(folder: Path) -> Path:
    """A whole model folder: 2 layers, 4 query heads, 2 KV heads, 512 positions."""
    tokenizer = make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>")
    tiny_llama(folder, vocab=512, sharded=True, eos=1)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@dataclass
class Bench:
    """Where wrong wishes are written.

    Attributes:
        folder: for specs and broken models.
        model: a whole model folder.
        cleanup: closes what a wish opened.
    """

    folder: Path
    model: Path
    cleanup: ExitStack = field(default_factory=ExitStack)

    def spec(self, *more: dict[str, Any], models: list[Any] | None = None, **model: Any) -> str:  # noqa: ANN401
        """A spec file of one model `m`, with these fields changed; returns its path."""
        base = {"name": "m", "path": str(self.model), "device": "cpu"}
        base |= {"dtype": "float32", "kv": {"memory": "8MiB"}}
        data: dict[str, Any] = {"models": models or [base | model], "gateway": {"port": 0}}
        for sections in more:
            data |= sections
        return self.text(yaml.safe_dump(data))

    def text(self, text: str) -> str:
        """A spec file with this text; returns its path."""
        path = self.folder / "wrong.yaml"
        path.write_text(text)
        return str(path)

    def big(self) -> str:
        """A folder with the config of a model of 405 billion parameters."""
        folder = self.folder / "llama-405b"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(LLAMA_405B))
        return str(folder)

    def broken(self) -> str:
        """A copy of the model whose second file of weights is cut short."""
        folder = self.folder / "broken"
        shutil.copytree(self.model, folder, dirs_exist_ok=True)
        file = sorted(folder.glob("*.safetensors"))[1]
        os.truncate(file, file.stat().st_size - 100)
        return str(folder)

    def taken_port(self) -> int:
        """A port on which a program listens."""
        server = self.cleanup.enter_context(socket.create_server(("127.0.0.1", 0)))
        port: int = server.getsockname()[1]
        return port

    def file(self) -> str:
        """A path below a file, where no folder can be made."""
        (self.folder / "file").write_text("")
        return str(self.folder / "file" / "kv")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A wish that cannot be.

    Attributes:
        name: for people.
        command: arguments of `arriero`.
        says: what the answer must have: field, limit, value, remedy.
        code: exit code.
        live: the wish is one to a deployment that serves.
        machine: resources of the machine as Ray would report them; None for this machine's.
    """

    name: str
    command: Callable[[Bench], list[str]]
    says: tuple[str, ...]
    code: int = 2
    live: bool = False
    machine: Mapping[str, float] | None = None


def up(name: str, says: tuple[str, ...], spec: Callable[[Bench], str], code: int = 2) -> Wish:
    """A wrong spec for `arriero up`."""
    return Wish(name=name, command=lambda at: ["up", spec(at)], says=says, code=code)


def rollout(name: str, says: tuple[str, ...], spec: Callable[[Bench], str], code: int = 2) -> Wish:
    """A wrong spec for `arriero rollout`."""
    command: Callable[[Bench], list[str]] = lambda at: ["rollout", spec(at)]  # noqa: E731
    return Wish(name=name, command=command, says=says, code=code, live=True)


def live(name: str, says: tuple[str, ...], *command: str, code: int = 2) -> Wish:
    """A wrong wish to a deployment that serves."""
    return Wish(name=name, command=lambda at: list(command), says=says, code=code, live=True)


BEFORE = [
    up(
        "a 405B model on the CPUs of this machine",
        ("`mesh` TP1 does not fit the memory", "1623.43 GB", "add nodes with more memory"),
        lambda at: at.spec(path=at.big(), kv={}),
    ),
    up("tp 10", ("`tp`=10 must be 1 to 4", "query heads"), lambda at: at.spec(mesh={"tp": 10})),
    up(
        "5 slices, where there are 4 query heads and 2 KV heads",
        ("`tp`=5 must be 1 to 4",),
        lambda at: at.spec(mesh={"tp": 5}),
    ),
    up("pp 3 of 2 layers", ("`pp`=3 must be 1 to 2",), lambda at: at.spec(mesh={"pp": 3})),
    up(
        "max_model_len 100000",
        ("`max_model_len`=100000 must be 1 to 512",),
        lambda at: at.spec(limits={"max_model_len": 100_000}),
    ),
    up(
        "dp 2 on a dense model",
        ("`dp`=2", "a dense model has no experts", "use more groups instead"),
        lambda at: at.spec(mesh={"dp": 2}),
    ),
    up(
        "1000 groups",
        ("`groups`=1000 exceeds", "lower `groups`"),
        lambda at: at.spec(groups=1000),
    ),
    up(
        "a YAML alias that contains itself",
        ("wrong.yaml:1: `models.0` is an alias", "write the value out"),
        lambda at: at.text("models: &a [*a]\n"),
    ),
    up(
        "aliases that repeat values without end",
        ("aliases repeat values to more than",),
        lambda at: at.text(
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
                for before, name in zip("abcdefg", "bcdefgh", strict=True)
            )
        ),
    ),
    up(
        "a port that is taken",
        ("`gateway.port`=", "another program listens on 127.0.0.1:", "give another port"),
        lambda at: at.spec({"gateway": {"port": at.taken_port()}}),
    ),
    up(
        "gRPC and HTTP on one port",
        ("`gateway.http.port`=8123 is the port of `gateway.port` too", "give each its own"),
        lambda at: at.spec({"gateway": {"port": 8123, "http": {"port": 8123}}}),
    ),
    up(
        "a gateway at an address of another machine",
        ("`gateway.host`='192.0.2.1' is no address of this machine",),
        lambda at: at.spec({"gateway": {"host": "192.0.2.1", "port": 0}}),
    ),
    up(
        "two gateways with a fixed port on one machine",
        ("`gateway.count`=2 exceeds 1", "`gateway.port`", "set the port to 0"),
        lambda at: at.spec({"gateway": {"port": 50999, "count": 2}}),
    ),
    up(
        "a folder of KV blocks below a file",
        ("`kv.disk.path`=", "is no folder; give another path"),
        lambda at: at.spec(kv={"disk": {"path": at.file(), "size": "1GiB"}}),
    ),
    up(
        "more KV blocks than the disk has bytes",
        ("`kv.disk.size`=", "exceeds the", "lower the size"),
        lambda at: at.spec(kv={"disk": {"path": str(at.folder), "size": "900000GiB"}}),
    ),
    up(
        "an unknown field",
        ("`models[0].grops`: no such field; did you mean `groups`?",),
        lambda at: at.spec(grops=2),
    ),
    up(
        "a negative count",
        ("`models[0].groups`=-1: must be greater than or equal to 1",),
        lambda at: at.spec(groups=-1),
    ),
    up(
        "two models of one name",
        ("model name `m` occurs twice", "give each model and each adapter its own"),
        lambda at: at.spec(models=[{"name": "m", "path": str(at.model)}] * 2),
    ),
    up(
        "a model folder that is missing",
        ("model `m`", "nowhere has no config.json", "give the folder of a checkpoint"),
        lambda at: at.spec(path="nowhere"),
    ),
    up(
        "a file of weights that is cut short",
        ("model `m`", "model-00002-of-00003.safetensors: truncated", "fetch the file again"),
        lambda at: at.spec(path=at.broken()),
        code=5,
    ),
    up(
        "GPUs where there are none",
        ("1 slices need a GPU each, but the cluster has 0", "set `device: cpu`"),
        lambda at: at.spec(device="cuda"),
    ),
    Wish(
        name="fp8 on GPUs without float8 numbers",
        command=lambda at: ["up", at.spec(device="cuda", quantization="fp8")],
        says=("`quantization`='fp8' needs compute capability 8.9", "a100-80g", "int8"),
        machine={"CPU": 8, "GPU": 8, "memory": 1e12, "accelerator_type:A100": 1.0},
    ),
    Wish(
        name="a 405B model on one GPU of 80 GB",
        command=lambda at: ["up", at.spec(path=at.big(), device="cuda", kv={})],
        says=("`mesh` TP1 does not fit the memory of h100-80g", "raise `mesh.pp` or `mesh.tp`"),
        machine={"CPU": 8, "GPU": 8, "memory": 1e12, "accelerator_type:H100": 1.0},
    ),
    up(
        "a quantization that does not exist",
        ("`models[0].quantization`='int2': must be 'int8', 'int4' or 'fp8'",),
        lambda at: at.spec(quantization="int2"),
    ),
    up(
        "a key file that cannot be read",
        ("`gateway.keys`", "Is a directory", "`arriero keys add` makes the file"),
        lambda at: at.spec({"gateway": {"port": 0, "keys": str(at.folder)}}),
    ),
    up(
        "kernels that do not exist",
        ("`kernels`='mkl' is none of reference, cpu, triton",),
        lambda at: at.spec(kernels="mkl"),
    ),
    up(
        "more groups than autoscaling allows",
        ("`groups`=3 is not within `autoscale`'s 1 to 2",),
        lambda at: at.spec(groups=3, autoscale={"max": 2}),
    ),
]

LIVE = [
    live("scale to 1000", ("`groups`=1000 exceeds", "lower `groups`"), "scale", "m", "1000"),
    live("scale an unknown model", ("no model 'nope'", "m"), "scale", "nope", "2", code=4),
    live("drain an unknown group", ("no group or seat 'nope'", "m-0"), "drain", "nope", code=4),
    live("drain an unknown node", ("no node 'nope'",), "node", "drain", "nope", code=4),
    live("roll back without a revision before", ("no revision before 1",), "rollback", "m"),
    live("logs of nothing", ("nothing called 'nope'", "gateways"), "logs", "nope", code=4),
    live(
        "pin an empty text",
        ("there is no text to pin", "give a text"),
        *("kv", "pin", "", "--name", "p"),
    ),
    live(
        "pin less than a block",
        ("fill no block of `kv.block_size` tokens", "give a longer text"),
        *("kv", "pin", "a", "--raw", "--name", "p"),
    ),
    live("unpin nothing", ("nothing is pinned as 'nope'",), "kv", "unpin", "nope", code=4),
    rollout(
        "roll out a 405B model on these CPUs",
        ("does not fit the memory", "1623.43 GB"),
        lambda at: at.spec(path=at.big(), kv={}),
    ),
    rollout(
        "roll out 10 slices of 4 heads",
        ("`tp`=10 must be 1 to 4",),
        lambda at: at.spec(mesh={"tp": 10}),
    ),
    rollout(
        "roll out max_model_len 100000",
        ("`max_model_len`=100000 must be 1 to 512",),
        lambda at: at.spec(limits={"max_model_len": 100_000}),
    ),
    rollout(
        "roll out a broken model",
        ("truncated", "fetch the file again"),
        lambda at: at.spec(path=at.broken()),
        code=5,
    ),
    rollout(
        "roll out a name with a typing error",
        ("the spec lacks `m`, which serves", "SPEC --prune`"),
        lambda at: at.spec(name="mm"),
    ),
    rollout(
        "roll out another Ray cluster",
        ("`ray.num_cpus` cannot be changed", "`arriero down`, then `arriero up SPEC`"),
        lambda at: at.spec({"ray": {"num_cpus": 3}}),
    ),
    rollout(
        "roll out a folder of KV blocks below a file",
        ("`kv.disk.path`=", "is no folder"),
        lambda at: at.spec(kv={"disk": {"path": at.file(), "size": "1GiB"}}),
    ),
    rollout(
        "roll out a port that is taken",
        ("`gateway.port`=", "another program listens on"),
        lambda at: at.spec({"gateway": {"port": at.taken_port()}}),
    ),
    Wish(
        name="reload another mesh",
        command=lambda at: ["reload", at.spec(mesh={"pp": 2})],
        says=("`models[m].mesh.pp` cannot be changed while everything runs", "arriero rollout"),
        live=True,
    ),
]
