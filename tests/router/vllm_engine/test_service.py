"""VllmEngine over real sockets, called by the client that `smg-grpc-proto` generates."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
import trustme
from tokenizers import Tokenizer

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed: arriero[smg]")

from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as rpc
from smg_grpc_proto.generated import common_pb2 as common

from arriero.router import vllm_engine
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.tenants.keys import add_key
from arriero.router.tenants.tenant import Tenant
from arriero.router.tls import TlsFiles
from arriero.shards.errors import SpecError
from support.eventually import eventually_async
from support.frontdoor import CHATML, Policy, Stack, echo, endless, make_card, serve

CONFIG = GatewayConfig(lost_s=0.5, vllm_engine="")


@asynccontextmanager
async def engine_of(
    tokenizer: Tokenizer, policy: Policy = echo, *, step_s: float = 0.0, **changes: object
) -> AsyncIterator[tuple[Stack, rpc.VllmEngineStub]]:
    card = make_card(tokenizer, CHATML, **changes)
    async with (
        asyncio.timeout(60),
        serve(card, policy, step_s=step_s, config=CONFIG) as stack,
        grpc.aio.insecure_channel(stack.address) as channel,
    ):
        yield stack, rpc.VllmEngineStub(channel)


def request(
    prompt: list[int], *, stream: bool = True, request_id: str = "r", **sampling: object
) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id=request_id,
        tokenized=vllm.TokenizedInput(input_ids=prompt),
        sampling_params=vllm.SamplingParams(**sampling),
        stream=stream,
    )


async def ends_of(call: grpc.aio.UnaryStreamCall) -> list[vllm.GenerateComplete]:
    """The completes among the rest of a call's messages."""
    ends = []
    while (message := await call.read()) is not grpc.aio.EOF:
        if message.HasField("complete"):
            ends.append(message.complete)
    return ends


async def test_generate_streams_new_ids_and_completes(chatml_tokenizer: Tokenizer) -> None:
    prompt = [50, 51, 52]
    async with engine_of(chatml_tokenizer) as (_, stub):
        sent = [m async for m in stub.Generate(request(prompt, n=2, max_tokens=10, logprobs=1))]
        for index in range(2):
            chunks = [m.chunk for m in sent if m.HasField("chunk") and m.chunk.index == index]
            ids = [token for chunk in chunks for token in chunk.token_ids]
            (end,) = (
                m.complete for m in sent if m.HasField("complete") and m.complete.index == index
            )
            assert ids == [*prompt, 1] == list(end.output_ids)
            assert (end.finish_reason, end.matched_token_id) == ("stop", 1)
            assert (end.prompt_tokens, end.completion_tokens) == (3, 4)
            assert list(end.output_logprobs.token_ids) == ids
        (whole,) = [m async for m in stub.Generate(request(prompt, stream=False, max_tokens=2))]
        assert list(whole.complete.output_ids) == prompt[:2]
        assert whole.complete.finish_reason == "length"
        # a limit above the room is lowered
        (whole,) = [m async for m in stub.Generate(request(prompt, stream=False, max_tokens=9999))]
        assert whole.complete.finish_reason == "stop"


async def test_stop_strings_are_matched(chatml_tokenizer: Tokenizer) -> None:
    prompt = chatml_tokenizer.encode("the quick brown fox").ids
    async with engine_of(chatml_tokenizer) as (_, stub):
        asked = request(prompt, stream=False, stop=["brown"], max_tokens=30)
        (sent,) = [m async for m in stub.Generate(asked)]
        assert (sent.complete.finish_reason, sent.complete.matched_stop_str) == ("stop", "brown")
        assert list(sent.complete.output_ids) == prompt[: len(sent.complete.output_ids)]


async def test_refusals_have_statuses(chatml_tokenizer: Tokenizer) -> None:
    async with engine_of(chatml_tokenizer) as (stack, stub):
        cases = [
            (request([]), "prompt is empty"),
            (request([50] * 600), "maximum context length is 512"),
            (request([50, 10**6]), r"`prompt\[1\]`=1000000 is no token"),
            (request([50], temperature=-1.0), "temperature"),
            (request([50], logprobs=99), "logprobs"),
            (request([50], n=1000), "`n`"),
            (request([50], regex="(?=a)"), "regex"),
            (request([50], structural_tag="{}"), "structural_tag"),
            (request([50], request_id="has space"), "request_id"),
        ]
        for asked, words in cases:
            with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
                [m async for m in stub.Generate(asked)]
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, words
        for refused in (
            stub.Embed(vllm.EmbedRequest()),
            stub.FlushCache(common.FlushCacheRequest()),
            stub.StartProfile(common.StartProfileRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="is not supported") as caught:
                await refused
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        await stack.gateway.set_groups([])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [m async for m in stub.Generate(request([50]))]
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        health = await stub.HealthCheck(vllm.HealthCheckRequest())
        assert not health.healthy and "no model is served" in health.message


async def test_abort_ends_the_stream_and_frees_the_engine(chatml_tokenizer: Tokenizer) -> None:
    async with engine_of(chatml_tokenizer, endless, step_s=0.005) as (stack, stub):
        # two calls of one id (a caller's retry) run side by side, and one abort ends both
        asked = request([50, 51], n=2, max_tokens=400)
        calls = [stub.Generate(asked) for _ in range(2)]
        for call in calls:
            assert (await call.read()).HasField("chunk")
        await eventually_async(lambda: len(stack.engine.running) == 2)
        for _ in range(2):
            await stub.Abort(vllm.AbortRequest(request_ids=["unknown", "r", "r"]))
        for call in calls:
            ends = await ends_of(call)
            assert sorted((end.index, end.finish_reason) for end in ends) == [
                (0, "abort"),
                (1, "abort"),
            ]
            assert all(len(end.output_ids) == end.completion_tokens >= 1 for end in ends)
        await eventually_async(lambda: not stack.engine.running)
        # a caller that leaves frees the engine as well
        call = stub.Generate(asked)
        await call.read()
        call.cancel()
        await eventually_async(lambda: len(stack.engine.cancelled) == 3)
        assert not stack.engine.running


async def test_facts(chatml_tokenizer: Tokenizer) -> None:
    changes = {"generation_defaults": {"temperature": 0.6}, "numerics": "float32 int8"}
    async with engine_of(chatml_tokenizer, endless, step_s=0.01, **changes) as (_, stub):
        assert (await stub.HealthCheck(vllm.HealthCheckRequest())).healthy
        info = await stub.GetModelInfo(vllm.GetModelInfoRequest())
        assert (info.served_model_name, info.max_context_length) == ("tiny", 512)
        assert info.is_generation and list(info.eos_token_ids) == [1]
        assert json.loads(info.default_sampling_params_json) == {"temperature": 0.6}
        call = stub.Generate(request([50], max_tokens=200))
        await call.read()
        server = await stub.GetServerInfo(vllm.GetServerInfoRequest())
        assert (server.active_requests, server.server_type) == (1, "vllm-grpc")
        assert server.model_dtype == "torch.float32" and server.uptime_seconds > 0

        async def running() -> int:
            loads = await stub.GetLoads(vllm.GetLoadsRequest(include=["core"]))
            (load,) = loads.loads
            return int(load.num_running_reqs)

        async with asyncio.timeout(10):
            while not await running():
                await asyncio.sleep(0.1)
        call.cancel()


async def test_facts_wait_for_the_first_group_and_outlive_the_last(
    chatml_tokenizer: Tokenizer,
) -> None:
    """A caller that got an error here would register a worker without a model."""
    async with engine_of(chatml_tokenizer) as (stack, stub):
        groups = [GroupAddress("g0", "tiny", stack.link_address)]
        await stack.gateway.set_groups([])
        asked = asyncio.ensure_future(stub.GetModelInfo(vllm.GetModelInfoRequest()))
        await asyncio.sleep(0.3)
        assert not asked.done()
        await stack.gateway.set_groups(groups)
        assert (await asked).served_model_name == "tiny"
        await stack.gateway.set_groups([])
        assert (await stub.GetModelInfo(vllm.GetModelInfoRequest())).served_model_name == "tiny"
        assert (await stub.GetServerInfo(vllm.GetServerInfoRequest())).max_num_seqs == 256
        assert [chunk async for chunk in stub.GetTokenizer(common.GetTokenizerRequest())]


async def test_subscribers_do_not_delay_the_end_of_a_gateway(chatml_tokenizer: Tokenizer) -> None:
    async with engine_of(chatml_tokenizer) as (stack, stub):
        call = stub.SubscribeKvEvents(
            common.SubscribeKvEventsRequest(load_records_before_first_batch=True)
        )
        assert (await call.read()).load.load_only
        async with asyncio.timeout(20):
            await stack.gateway.stop(40)
        while await call.read() is not grpc.aio.EOF:
            pass
        assert await call.code() == grpc.StatusCode.OK


async def test_the_tokenizer_comes_as_a_zip(
    chatml_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.router.vllm_engine.tokenizer_files.CHUNK_BYTES", 1000)
    changes = {
        "named_templates": {"tool_use": CHATML + "{# tools #}"},
        "special_tokens": {"pad_token": "<p>"},
    }
    async with engine_of(chatml_tokenizer, **changes) as (_, stub):
        chunks = [chunk async for chunk in stub.GetTokenizer(common.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert len(chunks) > 1 and max(len(chunk.data) for chunk in chunks) <= 1000
    assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(tmp_path)
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read.get_vocab() == chatml_tokenizer.get_vocab()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == CHATML == (tmp_path / "chat_template.jinja").read_text()
    assert settings["pad_token"] == "<p>"
    assert (
        tmp_path / "additional_chat_templates" / "tool_use.jinja"
    ).read_text() == CHATML + "{# tools #}"
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [1]


async def test_loads_arrive_before_the_first_event_only_if_wanted(
    chatml_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.router.vllm_engine.service.HEARTBEAT_S", 0.05)
    async with engine_of(chatml_tokenizer) as (_, stub):
        early = stub.SubscribeKvEvents(
            common.SubscribeKvEventsRequest(load_records_before_first_batch=True)
        )
        records = [await early.read() for _ in range(3)]
        assert [record.load.sample for record in records] == [1, 2, 3]
        assert all(record.load.load_only and not record.events for record in records)
        assert {record.sequence_number for record in records} == {0}
        assert records[0].load.max_running_requests == 256
        late = stub.SubscribeKvEvents(common.SubscribeKvEventsRequest())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(late.read(), 0.3)
        early.cancel()
        late.cancel()


async def test_keys_and_tls_are_as_everywhere(chatml_tokenizer: Tokenizer, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    paths = {name: tmp_path / name for name in ("certificate", "key", "ca")}
    certificate.cert_chain_pems[0].write_to_path(paths["certificate"])
    certificate.private_key_pem.write_to_path(paths["key"])
    keys = tmp_path / "keys.yaml"
    secrets = [add_key(keys, tenant) for tenant in ("a", "b")]
    config = replace(
        CONFIG,
        keys=keys,
        tenants=(Tenant(name="b", metrics=True),),
        tls=TlsFiles(certificate=paths["certificate"], key=paths["key"]),
    )
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    card = make_card(chatml_tokenizer, CHATML)
    async with (
        asyncio.timeout(60),
        serve(card, endless, step_s=0.005, config=config) as stack,
        grpc.aio.secure_channel(f"localhost:{stack.port}", credentials) as channel,
    ):
        stub = rpc.VllmEngineStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetLoads(vllm.GetLoadsRequest())
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        a, b = ((("authorization", f"Bearer {secret}"),) for secret in secrets)
        call = stub.Generate(request([50], max_tokens=400), metadata=a)
        await call.read()
        # an id is its tenant's: another tenant cannot abort the request
        await stub.Abort(vllm.AbortRequest(request_ids=["r"]), metadata=b)
        assert (await call.read()).HasField("chunk")
        await stub.Abort(vllm.AbortRequest(request_ids=["r"]), metadata=a)
        assert [end.finish_reason for end in await ends_of(call)] == ["abort"]
        # events hold token ids of all tenants
        refused = stub.SubscribeKvEvents(common.SubscribeKvEventsRequest(), metadata=a)
        with pytest.raises(grpc.aio.AioRpcError, match="may not read") as caught:
            await refused.read()
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        allowed = stub.SubscribeKvEvents(
            common.SubscribeKvEventsRequest(load_records_before_first_batch=True), metadata=b
        )
        assert (await allowed.read()).load.load_only
        allowed.cancel()


async def test_the_service_is_off_by_default(chatml_tokenizer: Tokenizer) -> None:
    card = make_card(chatml_tokenizer, CHATML)
    async with (
        asyncio.timeout(60),
        serve(card, echo) as stack,
        grpc.aio.insecure_channel(stack.address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.VllmEngineStub(channel).HealthCheck(vllm.HealthCheckRequest())
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(vllm_engine, "import_module", missing)
    with pytest.raises(SpecError, match=r"pip install 'arriero\[smg\]'"):
        Gateway(CONFIG)
