"""A deployment from end to end: `arriero up` on a local Ray cluster, gRPC, loss, `arriero down`."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import httpx
import openai
import psutil
import pytest

from arriero.cluster import deployment_file as state
from arriero.cluster.control.admin_client import AdminClient
from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.spec.deployment import RaySpec
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.proto.arriero.v1 import inference_pb2_grpc
from arriero.shards.errors import ArrieroError, InvalidRequest, NotFound
from support.command import arriero
from support.eventually import eventually
from support.strangers import code_of

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
SERVE = "/ray.serve.ASGIService/HandleRequest"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


@pytest.fixture(scope="module", autouse=True)
def home_with_a_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The home of a user who has used Ray before: `ray.init()` leaves a token there."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("f" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.delenv("RAY_AUTH_MODE", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state folder of a deployment of two pipeline stages, which is taken down at the end."""
    folder = tmp_path_factory.mktemp("state")
    try:
        arriero(
            *("up", "--model", MODEL, "--pp", "2", "--port", "0", "--dtype", "float32"),
            *("--name", "demo", "--kv-memory", "128MiB"),
            folder=folder,
        )
        yield folder
    finally:
        deployment = state.read(folder)
        arriero("down", folder=folder)
        assert deployment is not None and deployment.local_session is not None
        assert local.members(deployment.local_session) == []
        assert not Path(deployment.local_folder or "/").exists()
        assert state.read(folder) is None


@pytest.fixture
def gateway(folder: Path) -> str:
    deployment = state.read(folder)
    assert deployment is not None
    return deployment.gateway


@pytest.fixture
def stub(gateway: str) -> Iterator[inference_pb2_grpc.InferenceStub]:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(gateway, options=options) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def status(folder: Path) -> dict[str, object]:
    answer: dict[str, object] = json.loads(arriero("status", "--json", folder=folder).stdout)
    return answer


def tokens(answers: Iterator[pb.GenerateResponse]) -> list[int]:
    return [token for answer in answers for one in answer.outputs for token in one.token_ids]


def capital(max_tokens: int = 24) -> pb.ChatRequest:
    return pb.ChatRequest(
        messages=[pb.Message(role="user", content="What is the capital of France?")],
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=max_tokens),
    )


def test_chat_names_paris(stub: inference_pb2_grpc.InferenceStub) -> None:
    answers = list(stub.Chat(capital(), timeout=60))
    text = "".join(one.text for answer in answers for one in answer.outputs)
    assert "Paris" in text
    assert answers[-1].usage.completion_tokens == len(tokens(iter(answers)))


def test_http_beside_grpc(folder: Path) -> None:
    deployment = state.read(folder)
    assert deployment is not None
    with openai.OpenAI(base_url=f"http://{deployment.http}/v1", api_key="none") as ask:
        answer = ask.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_completion_tokens=24,
        )
    assert "Paris" in (answer.choices[0].message.content or "")
    with urllib.request.urlopen(f"http://{deployment.http}/health") as health:
        assert json.load(health)["status"] == "ok"
    assert deployment.http in arriero("status", folder=folder).stdout


def test_the_console_shows_the_cluster_to_admins_alone(folder: Path) -> None:
    deployment = state.read(folder)
    assert deployment is not None
    with httpx.Client(base_url=f"http://{deployment.http}", timeout=60) as ask:
        assert "arriero console" in ask.get("/console").text
        for given in ({}, {"authorization": f"Bearer {'x' * 43}"}):
            assert ask.get("/console/cluster.json", headers=given).status_code == 401
        given = {"authorization": f"Bearer {deployment.admin_token}"}
        answer = ask.get("/console/cluster.json", headers=given)
    assert answer.status_code == 200, answer.text
    seen = answer.json()
    (group,) = seen["status"]["groups"]
    assert (group["model"], group["phase"], len(group["slice_pids"])) == ("demo", "serving", 2)
    assert [cache["group"] for cache in seen["kv"]] == [group["id"]]
    assert any(event["kind"] == "serving" for event in seen["events"])


def test_chat_on_the_command_line(folder: Path) -> None:
    asked = ("chat", "--message", "What is the capital of France?", "--temperature", "0")
    assert "Paris" in arriero(*asked, "--max-tokens", "24", folder=folder).stdout
    said = arriero(
        "generate", "The capital of France is", "--max-tokens", "0", folder=folder, check=False
    )
    assert said.returncode == 2
    assert "max_tokens" in said.stderr and "Traceback" not in said.stderr


def test_nobody_without_the_token_is_answered(folder: Path) -> None:
    """All listen on loopback alone; the GCS and Serve's replicas want the token besides."""
    deployment = state.read(folder)
    assert deployment is not None and deployment.local_session is not None
    assert (folder / "deployment.json").stat().st_mode & 0o077 == 0
    listeners = [
        one.laddr
        for pid in local.members(deployment.local_session)
        for one in psutil.Process(pid).net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    ]
    assert all(at.ip.endswith("127.0.0.1") for at in listeners)
    gcs = int(deployment.ray_address.rpartition(":")[2])
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    for metadata in ((), (("authorization", "Bearer " + "f" * 64),)):
        assert code_of(gcs, "/ray.rpc.NodeInfoGcsService/CheckAlive", metadata) is unauthenticated
        refusing = [
            at.port for at in listeners if code_of(at.port, SERVE, metadata) is unauthenticated
        ]
        assert len(refusing) == 2, "the replicas of the gateway and of the leader"


def test_a_second_up_is_refused(folder: Path) -> None:
    said = arriero("up", "--model", MODEL, folder=folder, check=False)
    assert said.returncode == 2 and "arriero down" in said.stderr


def test_admin_wants_the_token(folder: Path) -> None:
    deployment = state.read(folder)
    assert deployment is not None
    assert (folder / "deployment.json").stat().st_mode & 0o077 == 0
    for token in ("", "wrong", deployment.admin_token + "x"):
        with AdminClient(deployment.admin, token) as client:
            with pytest.raises(ArrieroError, match="admin token"):
                client.status()
    with AdminClient.of(deployment) as client:
        with pytest.raises(NotFound, match="the deployment has demo"):
            client.scale("other", 1)
        with pytest.raises(NotFound, match="the deployment has demo-0"):
            client.drain("demo-9")
        with pytest.raises(InvalidRequest, match="no revision before 1"):
            client.rollback("demo")
        with pytest.raises(InvalidRequest, match=r"models\[0\].path"):
            client.rollout("models: [{name: demo}]")
        assert "as they were" in client.rollout()
        assert client.status().models[0].settled


def test_operators_commands(folder: Path) -> None:
    """Each gives JSON, and a form for people."""
    looks = arriero("top", "--count", "1", "--json", folder=folder).stdout
    assert json.loads(looks)["groups"][0]["seat"] == "demo-0"
    assert "tokens/s" in arriero("top", "--count", "1", folder=folder).stdout
    logs = json.loads(arriero("logs", "demo-0", "--json", folder=folder).stdout)
    assert [one["who"] for one in logs] == ["leader", "slice 0", "slice 1"]
    findings = json.loads(arriero("doctor", "--json", folder=folder).stdout)
    assert not [one for one in findings if one["grade"] == "fail"]
    said = arriero("drain", "nothing", folder=folder, check=False)
    assert said.returncode == 4 and said.stderr.count("\n") == 1


NAN = float("nan")
BAD = [
    (pb.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT),
    (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 9000)), grpc.StatusCode.INVALID_ARGUMENT),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**31])), grpc.StatusCode.INVALID_ARGUMENT),
    (pb.GenerateRequest(text="a", model="none"), grpc.StatusCode.NOT_FOUND),
    (
        pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=0)),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    (
        pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=-1)),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    (
        pb.GenerateRequest(text="a", sampling=pb.SamplingParams(temperature=NAN)),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    (pb.GenerateRequest(text="a" * 100_000_000), grpc.StatusCode.RESOURCE_EXHAUSTED),
]


@pytest.mark.parametrize(("request_", "code"), BAD, ids=range(len(BAD)))
def test_bad_input(
    stub: inference_pb2_grpc.InferenceStub, request_: pb.GenerateRequest, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request_, timeout=60))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() == code
    assert caught.value.details()
    assert len(tokens(stub.Chat(capital(2), timeout=60))) == 2  # and it goes on


def test_invalid_utf8(gateway: str) -> None:
    text_field = b"\x1a\x02\xff\xfe"
    with grpc.insecure_channel(gateway) as channel:
        call = channel.unary_stream("/arriero.v1.Inference/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(text_field, timeout=60))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)


async def test_64_streams_a_third_cancelled(gateway: str, folder: Path) -> None:
    """Every other stream is complete and right, and no block stays in use."""
    rng = random.Random(64)
    num_tokens = 24

    def request(index: int) -> pb.GenerateRequest:
        prompt = [(7 * index + 13 * j) % 40000 + 100 for j in range(5 + index % 60)]
        return pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
        )

    async def run(
        stub: inference_pb2_grpc.InferenceAsyncStub, index: int, cancel_after: int | None
    ) -> list[int]:
        got: list[int] = []
        call = stub.Generate(request(index), timeout=200)
        async for answer in call:
            got += [token for one in answer.outputs for token in one.token_ids]
            if cancel_after is not None and len(got) >= cancel_after:
                call.cancel()
                break
        return got

    async with grpc.aio.insecure_channel(gateway) as channel:
        stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[assignment]
        cancelled = set(rng.sample(range(64), 21))
        jobs = [
            run(stub, i, rng.randint(1, num_tokens - 1) if i in cancelled else None)
            for i in range(64)
        ]
        together = await asyncio.gather(*jobs)
        kept = [i for i in range(64) if i not in cancelled]
        for i in kept:
            assert together[i] == await run(stub, i, None), f"stream {i} differs from its own alone"
    assert all(len(together[i]) == num_tokens for i in kept)
    deadline_s = time.monotonic() + 10
    while True:
        groups = status(folder)["groups"]
        assert isinstance(groups, list)
        load = groups[0]
        if (load["running"], load["waiting"], load["blocks_used"]) == (0, 0, 0):
            return
        assert time.monotonic() < deadline_s, load
        await asyncio.sleep(0.5)


def test_a_lost_slice_has_the_group_replaced(
    stub: inference_pb2_grpc.InferenceStub, folder: Path
) -> None:
    def group() -> dict[str, object] | None:
        groups = status(folder)["groups"]
        assert isinstance(groups, list)
        return next((one for one in groups if one["phase"] == "serving"), None)

    old = group()
    assert old is not None
    pids = old["slice_pids"]
    assert isinstance(pids, list)
    asked = capital(200)
    asked.sampling.ignore_eos = True
    undisturbed = tokens(stub.Chat(asked, timeout=60))
    survivor = stub.Chat(asked, timeout=120)
    got = tokens(itertools.islice(survivor, 20))
    os.kill(pids[1], signal.SIGKILL)
    got += tokens(survivor)  # by another life of the group
    assert got == undisturbed
    eventually(lambda: (now := group()) is not None and now["id"] != old["id"], 60, every_s=0.2)
    why = arriero("why", folder=folder).stdout
    assert f"slice 1 (pid {pids[1]}" in why and "crash" in why
    record = json.loads(arriero("why", str(old["seat"]), "--json", folder=folder).stdout)["record"]
    assert (record["cause"]["rank"], record["cause"]["pid"]) == (1, pids[1])
    events = arriero("events", "--json", folder=folder).stdout.splitlines()
    assert [json.loads(line)["kind"] for line in events][-2:] == ["lost", "serving"]
    answers = stub.Chat(capital(), timeout=60, wait_for_ready=True)
    assert "Paris" in "".join(one.text for answer in answers for one in answer.outputs)


def test_a_failed_up_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    """A checkpoint at a URL, which is seen on the cluster alone, whose template is broken."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").write_text("{% if %}")
    spec = tmp_path / "arriero.yaml"
    spec.write_text(f"models: [{{name: m, path: 'file://{model}'}}]\ngateway: {{port: 0}}\n")
    begun = time.time()
    said = arriero("up", str(spec), folder=tmp_path, check=False)
    assert said.returncode == 5, said.stderr
    assert "template" in said.stderr.splitlines()[-1] and "Traceback" not in said.stderr
    assert state.read(tmp_path) is None
    assert not [one for one in Path("/tmp").glob("arriero-ray-*") if one.stat().st_ctime > begun]


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = arriero(
            *("up", "--model", MODEL, "--port", str(port), "--kv-memory", "64MiB"),
            folder=tmp_path,
            check=False,
        )
    assert said.returncode == 2, said.stderr
    assert f"127.0.0.1:{port}" in said.stderr.splitlines()[-1]
    assert state.read(tmp_path) is None


def test_a_cluster_of_others_is_joined_and_left_as_it_was(tmp_path: Path) -> None:
    """With the token that it asks for, and not with another one, which lies in the home."""
    cluster = local.start(RaySpec(num_cpus=8))
    try:
        address = local.wait_address(cluster)
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        flags = ("--model", MODEL, "--port", "0", "--address", address, "--kv-memory", "64MiB")
        said = arriero("up", *flags, folder=ours, check=False)
        assert said.returncode == 1 and "refuses the token in ~/.ray" in said.stderr
        assert state.read(ours) is None
        with_token = {"RAY_AUTH_TOKEN": cluster.token}
        arriero("up", *flags, folder=ours, environment=with_token)
        said = arriero("up", *flags, folder=theirs, check=False, environment=with_token)
        assert said.returncode == 2 and "already" in said.stderr
        asked = ("chat", "--message", "What is the capital of France?", "--temperature", "0")
        assert "Paris" in arriero(*asked, "--max-tokens", "24", folder=ours).stdout
        pids = json.loads(arriero("status", "--json", folder=ours).stdout)["groups"][0]
        said = arriero("down", folder=ours, check=False)
        assert said.returncode == 1 and "RAY_AUTH_TOKEN" in said.stderr
        arriero("down", folder=ours, environment=with_token)
        assert not set(pids["slice_pids"]) & set(local.members(cluster.session))
        assert local.is_alive(cluster)
    finally:
        local.stop(cluster)


@pytest.mark.parametrize(
    ("signals", "code"),
    [((signal.SIGINT, signal.SIGINT), 130), ((signal.SIGTERM,), 143)],
    ids=["double Ctrl-C", "SIGTERM"],
)
def test_an_interrupted_up_leaves_nothing(
    tmp_path: Path, signals: tuple[signal.Signals, ...], code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "arriero.cluster.cli", "up", "--model", MODEL, "--port", "0"],
        env=os.environ | {"ARRIERO_STATE": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "starting leaders" in line:
            break
    deployment = state.read(tmp_path)
    assert deployment is not None and deployment.local_session is not None
    assert local.members(deployment.local_session)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert local.members(deployment.local_session) == []
    assert state.read(tmp_path) is None
