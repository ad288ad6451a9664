"""The command line without a cluster: help, refusals, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import typer

from arriero.cluster import cli
from arriero.cluster import deployment_file as state
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.router.proto.arriero.v1.admin_pb2_grpc import (
    AdminServicer,
    add_AdminServicer_to_server,
)
from arriero.shards.errors import SpecError

if TYPE_CHECKING:
    from click import Command

COMMANDS = (
    *("demo", "up", "down", "status", "chat", "generate", "models", "bench", "top", "scale"),
    *("drain", "rollout", "rollback", "reload", "events", "why", "logs", "doctor", "plan"),
    "keys",
)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path / "cache"))


def test_help_needs_neither_torch_nor_ray() -> None:
    begun_s = time.monotonic()
    code = (
        "import sys; from arriero.cluster import cli; cli.run(['--help'])\n"
        "print(sorted({'torch', 'ray', 'grpc'} & set(sys.modules)))"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in got.stdout for command in COMMANDS)
    assert got.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - begun_s < 5  # 0.3 s on a quiet machine


def test_operator_and_plan_need_no_torch() -> None:
    modules = ("control.operator", "spec.load", "commands.plan", "planner.report", "deploy")
    code = "; ".join([f"import arriero.cluster.{module}" for module in modules])
    code += "; import sys; print('torch' in sys.modules)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    assert "Usage: arriero" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["up"], 2, "nothing to serve"),
        (["up", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["up", "--model", "nowhere"], 2, "config.json"),
        (["up", "--tp"], 2, "--tp"),
        (["sing"], 2, "sing"),
        (["status"], 3, "nothing is up"),
        (["why"], 3, "nothing is up"),
        (["top"], 3, "nothing is up"),
        (["scale", "m", "2"], 3, "nothing is up"),
        (["scale", "m", "-1"], 2, "groups"),
        (["rollout", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["generate", "hello"], 3, "nothing is up"),
        (["chat", "--message", "hello"], 3, "nothing is up"),
        (["bench", "serve"], 3, "nothing is up"),
        (["bench", "engine", "--model", "nowhere"], 5, "nowhere"),
        (["models", "import", "nowhere.gguf"], 2, "no such file"),
    ],
)
def test_refusals(
    args: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(args) == code
    told = capsys.readouterr()
    assert said in told.err
    assert "Traceback" not in told.err


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for code, words in ((2, "wrong flag"), (3, "nothing serves"), (4, "no such model")):
        assert f"{code} {words}" in told


def leaves(command: Command, path: tuple[str, ...]) -> Iterator[tuple[str, Command]]:
    inner: dict[str, Command] = getattr(command, "commands", {})
    if not inner:
        yield " ".join(path), command
    for name, one in inner.items():
        yield from leaves(one, (*path, name))


def test_every_command_gives_json() -> None:
    root = typer.main.get_command(cli.app)
    without = [
        name
        for name, one in leaves(root, ())
        if not any("--json" in getattr(parameter, "opts", ()) for parameter in one.params)
    ]
    assert without == []


def test_the_shell_completes_commands_and_flags() -> None:
    """What a shell asks of the program, after `arriero --install-completion`."""
    for line, offered in (("arriero ro", "rollout"), ("arriero keys ro", "rotate-admin")):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        said = subprocess.run(
            [sys.executable, "-c", "from arriero.cluster import cli; cli.main()"],
            env=os.environ | words | {"_ARRIERO_COMPLETE": "complete_bash"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert offered in said.stdout.split(), said.stderr


class NoFailures(AdminServicer):
    """An Admin of a deployment in which nothing has failed."""

    def Why(self, request: pb.WhyRequest, context: grpc.ServicerContext) -> pb.WhyResponse:
        context.abort(grpc.StatusCode.NOT_FOUND, f"no failure of {request.name!r} is known")


def test_why_without_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    add_AdminServicer_to_server(NoFailures(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        deployment = state.Deployment(ray_address="", admin=f"127.0.0.1:{port}")
        state.write(tmp_path / "state", deployment)
        assert cli.run(["why"]) == 4
        assert "no group or gateway of this deployment has failed" in capsys.readouterr().err
        assert cli.run(["why", "demo-0"]) == 4
        assert "no failure of 'demo-0' is known" in capsys.readouterr().err
    finally:
        server.stop(None).wait()


class AsksForAToken(AdminServicer):
    """An Admin that has seen no event, for callers with its token."""

    def __init__(self, token: str) -> None:
        self._token = token

    def ListEvents(
        self, request: pb.ListEventsRequest, context: grpc.ServicerContext
    ) -> pb.ListEventsResponse:
        if ("authorization", f"Bearer {self._token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "not the admin token")
        return pb.ListEventsResponse()

    def RotateToken(
        self, request: pb.RotateTokenRequest, context: grpc.ServicerContext
    ) -> pb.RotateTokenResponse:
        return pb.RotateTokenResponse(token="another token")


def test_admin_of_another_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token, short = tmp_path / "token", tmp_path / "short"
    token.write_text("secret-of-32-characters-or-more\n")
    short.write_text("secret")
    server = grpc.server(ThreadPoolExecutor(1))
    add_AdminServicer_to_server(AsksForAToken(token.read_text().strip()), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        assert cli.run(["--admin", address, "--admin-token-file", str(token), "events"]) == 0
        assert cli.run(["events"]) == 3, "the flags are of one call"
        assert cli.run(["--admin", address, "events"]) == 2
        assert "needs Admin's token" in capsys.readouterr().err
        assert cli.run(["--admin", address, "--admin-token-file", str(short), "events"]) == 2
        assert "has 6 characters; give 16 or more" in capsys.readouterr().err
        monkeypatch.setenv("ARRIERO_ADMIN", address)
        monkeypatch.setenv("ARRIERO_ADMIN_TOKEN_FILE", str(token))
        assert cli.run(["events"]) == 0
        assert state.admin_token() == token.read_text().strip(), "`up` takes it too"
        capsys.readouterr()
        assert cli.run(["keys", "rotate-admin"]) == 0
        assert capsys.readouterr().out == "another token\n"
        token.write_text("a token that Admin does not know")
        assert cli.run(["events"]) == 1
    finally:
        server.stop(None).wait()


def test_down_with_nothing_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["down"]) == 0
    assert "nothing was up" in capsys.readouterr().out


def test_models_list_when_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["models", "list"]) == 0
    assert "models import" in " ".join(capsys.readouterr().err.split())


def test_state_is_read_back_and_refused_when_foreign(tmp_path: Path) -> None:
    deployment = state.Deployment(ray_address="h:1", gateway="h:2", local_session=7)
    state.write(tmp_path, deployment)
    assert state.read(tmp_path) == deployment
    (tmp_path / "deployment.json").write_text(json.dumps({"who": "else"}))
    with pytest.raises(SpecError, match="remove the file"):
        state.read(tmp_path)
    state.clear(tmp_path)
    state.clear(tmp_path)
    assert state.read(tmp_path) is None
