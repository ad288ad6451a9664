"""Keys, tenants, TLS and the queue, over real sockets on both listeners."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from tokenizers import Tokenizer

from arriero.router.client.client import AsyncClient
from arriero.router.gateway import Gateway, GatewayConfig, GroupAddress
from arriero.router.link.server import LinkServer
from arriero.router.tenants.keys import add_key, read_keys, revoke_key
from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.router.tls import LINK_NAME, TlsFiles
from arriero.shards.errors import Overloaded, PermissionDenied, SpecError, Unauthenticated
from support.eventually import eventually_async
from support.frontdoor import LLAMA3, FakeEngine, Stack, echo, endless, make_card, serve

ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def http(stack: Stack, **options: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.gateway.http_port}", **options)  # type: ignore[arg-type]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def answers(ask: httpx.AsyncClient, key: str, status: int) -> None:
    """Wait until the key has this answer."""
    async with asyncio.timeout(10):
        while (await ask.get("/v1/models", headers=bearer(key))).status_code != status:
            await asyncio.sleep(0.05)


async def tokens(client: AsyncClient, **fields: object) -> int:
    stream = client.generate([60, 61], **{"max_tokens": 4, **fields})
    return sum([len(o.token_ids) async for message in stream for o in message.outputs])


async def test_keys_are_asked_for_on_both_listeners(
    llama_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    key, admin = add_key(path, "acme"), add_key(path, "ops")
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.rpartition("-")[2] not in path.read_text()
    config = GatewayConfig(
        http_address="127.0.0.1:0", keys=path, tenants=(Tenant(name="ops", metrics=True),)
    )
    async with serve(make_card(llama_tokenizer, LLAMA3), endless, config=config) as stack:
        wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
        for shown in (None, "", "x", "none", wrong, "arr-000000000000-" + "0" * 64):
            async with AsyncClient(stack.address, api_key=shown) as client:
                with pytest.raises(Unauthenticated):
                    await tokens(client)
                with pytest.raises(Unauthenticated):
                    await client.models()
        async with AsyncClient(stack.address, api_key=key) as client:
            assert await tokens(client) == 4
        async with http(stack) as ask:
            for headers in ({}, bearer(wrong), {"authorization": f"Basic {key}"}):
                refused = await ask.post("/v1/chat/completions", json=ASK, headers=headers)
                assert refused.status_code == 401, refused.text
                assert refused.headers["www-authenticate"] == "Bearer"
                assert refused.json()["error"]["code"] == "invalid_api_key"
                assert refused.headers["x-request-id"]
            answer = await ask.post("/v1/chat/completions", json=ASK, headers=bearer(key))
            assert answer.status_code == 200, answer.text
            for headers in ({}, bearer(wrong)):  # strangers: no names, no loads
                health = await ask.get("/health", headers=headers)
                assert health.status_code == 200 and health.json() == {"status": "ok"}
            health = await ask.get("/health", headers=bearer(key))
            assert health.json()["groups"], "a caller with a key"
            assert (await ask.get("/openapi.json")).status_code == 200
            assert (await ask.get("/metrics")).status_code == 401
            assert (await ask.get("/metrics", headers=bearer(key))).status_code == 403
            metrics = (await ask.get("/metrics", headers=bearer(admin))).text
            assert 'arriero_tenant_tokens_total{kind="output",tenant="acme"} 8.0' in metrics
            # a key made now works within a second or so, and one that is revoked does not
            late = add_key(path, "acme")
            await answers(ask, late, 200)
            revoke_key(path, key.split("-")[1])
            await answers(ask, key, 401)
            path.write_text("keys: [nonsense]")
            await asyncio.sleep(0.6)  # long enough to be read: a broken file changes nothing
            assert (await ask.get("/v1/models", headers=bearer(late))).status_code == 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "a mapping with the one list `keys`"),
        ("keys: {", "not YAML"),
        ("keys: [3]", r"`keys\[0\]` is a int, not a mapping"),
        ("keys: [{id: '0'}]", r"`keys\[0\].tenant` is needed"),
        ("keys: [{id: zz, tenant: a, salt: a, hash: a, created: 1}]", "12 hexadecimal"),
        ("keys: [{secret: a}]", r"secret`: no such field"),
    ],
)
def test_key_files_are_refused_precisely(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=words):
        read_keys(path)


async def test_a_flood_waits_and_others_pass(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two places, and one ahead; a tenant keeps eight requests waiting, another asks once."""
    path = tmp_path / "keys.yaml"
    flood_key, quiet_key = add_key(path, "flood"), add_key(path, "quiet")
    config = GatewayConfig(keys=path, tenants=(Tenant(name="flood", max_queued=8),))
    card = make_card(llama_tokenizer, LLAMA3, max_sequences=2)
    async with (
        serve(card, endless, step_s=0.005, config=config) as stack,
        AsyncClient(stack.address, api_key=flood_key, timeout_s=60) as flood,
        AsyncClient(stack.address, api_key=quiet_key, timeout_s=60) as quiet,
    ):
        order: list[str] = []
        stack.engine.max_running = 0  # nothing ends before all of them wait

        async def ask(client: AsyncClient, name: str) -> None:
            await tokens(client, max_tokens=20)
            order.append(name)

        asked = [asyncio.create_task(ask(flood, "flood")) for _ in range(11)]
        waiting = stack.gateway.inference.admission.waiting
        await eventually_async(lambda: len(stack.engine.submitted) >= 3, every_s=0.002)
        await eventually_async(lambda: waiting() == {("tiny", "flood"): 8}, every_s=0.002)
        with pytest.raises(Overloaded, match="max_queued"):
            await tokens(flood)
        asked.append(asyncio.create_task(ask(quiet, "quiet")))
        stack.engine.max_running = None
        await asyncio.gather(*asked)
        assert order.index("quiet") <= 5
        assert len(stack.engine.submitted) == 12


async def test_refusals_say_when_to_come_back(llama_tokenizer: Tokenizer) -> None:
    config = GatewayConfig(
        http_address="127.0.0.1:0", tenants=(Tenant(name="anyone", requests_per_minute=6),)
    )
    async with (
        serve(make_card(llama_tokenizer, LLAMA3), echo, config=config) as stack,
        http(stack) as ask,
    ):
        for _ in range(6):
            await tokens(stack.client)
        with pytest.raises(Overloaded) as refused:
            await tokens(stack.client)
        assert 9 <= refused.value.retry_after_s <= 10
        answer = await ask.post("/v1/chat/completions", json=ASK)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] in ("9", "10")


async def test_what_waits_too_long_is_refused(llama_tokenizer: Tokenizer) -> None:
    config = GatewayConfig(http_address="127.0.0.1:0", limits=QueueLimits(max_wait_s=0.3))
    card = make_card(llama_tokenizer, LLAMA3, max_sequences=1, max_model_len=100_000)
    async with (
        serve(card, endless, step_s=0.002, config=config) as stack,
        http(stack) as ask,
    ):
        long = asyncio.gather(*(tokens(stack.client, max_tokens=50_000) for _ in range(2)))
        await eventually_async(lambda: len(stack.engine.submitted) >= 2, every_s=0.002)
        begun = time.monotonic()
        with pytest.raises(Overloaded, match=r"waited (0\.[3-9]|[1-9]\d*\.\d) s"):
            await tokens(stack.client)
        late = await ask.post(
            "/v1/chat/completions", json=ASK, headers={"x-request-timeout": "0.1"}
        )
        assert late.status_code == 429, late.text
        assert time.monotonic() - begun < 2
        bad = await ask.post("/v1/chat/completions", json=ASK, headers={"x-request-timeout": "no"})
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "x-request-timeout"
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
        async with asyncio.timeout(5):  # the place is free again
            assert await tokens(stack.client) == 4


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def files(folder: Path, authority: trustme.CA, name: str, *, ca: bool) -> TlsFiles:
    folder.mkdir()
    pair = authority.issue_cert(name)
    for number, blob in enumerate(pair.cert_chain_pems):
        blob.write_to_path(folder / "cert.pem", append=number > 0)
    pair.private_key_pem.write_to_path(folder / "key.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return TlsFiles(
        certificate=folder / "cert.pem",
        key=folder / "key.pem",
        ca=folder / "ca.pem" if ca else None,
    )


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls_on_both_listeners(
    llama_tokenizer: Tokenizer, tmp_path: Path, authority: trustme.CA, mutual: bool
) -> None:
    tls = files(tmp_path / "server", authority, "localhost", ca=mutual)
    mine = files(tmp_path / "client", authority, "someone", ca=True)
    assert mine.ca is not None
    ca = mine.ca.read_bytes()
    config = GatewayConfig(http_address="127.0.0.1:0", tls=tls)
    async with serve(make_card(llama_tokenizer, LLAMA3), endless, config=config) as stack:
        with pytest.raises(Exception, match=r"Socket closed|failed to connect|UNAVAILABLE"):
            await tokens(stack.client)  # in the clear
        named = f"localhost:{stack.port}"
        bare = grpc.ssl_channel_credentials(ca)
        shown = grpc.ssl_channel_credentials(
            ca, mine.key.read_bytes(), mine.certificate.read_bytes()
        )
        async with AsyncClient(named, credentials=shown, timeout_s=10) as client:
            assert await tokens(client) == 4
        context = ssl.create_default_context(cafile=str(mine.ca))
        base = f"https://localhost:{stack.gateway.http_port}"
        if mutual:
            async with AsyncClient(named, credentials=bare, timeout_s=5) as client:
                with pytest.raises(Exception, match=r"UNAVAILABLE|handshake|Socket|peer"):
                    await tokens(client)
            async with httpx.AsyncClient(base_url=base, verify=context) as ask:
                with pytest.raises(httpx.HTTPError):
                    await ask.get("/health")
            context.load_cert_chain(mine.certificate, mine.key)
        else:
            async with AsyncClient(named, credentials=bare, timeout_s=10) as client:
                assert await tokens(client) == 4
        async with httpx.AsyncClient(base_url=base, verify=context) as ask:
            assert (await ask.post("/v1/chat/completions", json=ASK)).status_code == 200


async def test_renewed_certificates_need_no_restart(
    llama_tokenizer: Tokenizer, tmp_path: Path, authority: trustme.CA
) -> None:
    """Both listeners take them for new connections; files that do not fit are not taken."""
    tls = files(tmp_path / "server", authority, "localhost", ca=False)
    config = GatewayConfig(http_address="127.0.0.1:0", tls=tls)
    later = trustme.CA()
    renewed = files(tmp_path / "renewed", later, "localhost", ca=False)
    roots = tmp_path / "later.pem"
    later.cert_pem.write_to_path(roots)
    async with serve(make_card(llama_tokenizer, LLAMA3), endless, config=config) as stack:

        async def asked(ca: Path) -> tuple[bool, bool]:
            """Whether gRPC and HTTP show certificates of that authority."""
            credentials = grpc.ssl_channel_credentials(ca.read_bytes())
            named = f"localhost:{stack.port}"
            grpc_too = http_too = True
            async with AsyncClient(named, credentials=credentials, timeout_s=5) as client:
                try:
                    await tokens(client)
                except Exception:
                    grpc_too = False
            base = f"https://localhost:{stack.gateway.http_port}"
            context = ssl.create_default_context(cafile=str(ca))
            async with httpx.AsyncClient(base_url=base, verify=context) as ask:
                try:
                    await ask.get("/health")
                except httpx.HTTPError:
                    http_too = False
            return grpc_too, http_too

        first = tmp_path / "server" / "ca.pem"
        assert await asked(first) == (True, True)
        tls.key.write_bytes(renewed.key.read_bytes())  # half of a pair: not taken
        await asyncio.sleep(1.2)
        assert await asked(first) == (True, True)
        tls.certificate.write_bytes(renewed.certificate.read_bytes())
        await asyncio.sleep(1.2)
        assert await asked(roots) == (True, True)
        assert await asked(first) == (False, False)


def test_wrong_certificates_are_refused_by_name(tmp_path: Path, authority: trustme.CA) -> None:
    good = files(tmp_path / "a", authority, "localhost", ca=True)
    other = files(tmp_path / "b", authority, "localhost", ca=True)
    for tls, words in (
        (TlsFiles(certificate=tmp_path / "none.pem", key=good.key), "No such file"),
        (TlsFiles(certificate=good.certificate, key=other.key), "no certificate with its key"),
        (TlsFiles(certificate=good.certificate, key=good.key, ca=good.key), r"`tls\.ca`"),
    ):
        with pytest.raises(SpecError, match=words):
            tls.server("tls")


async def test_a_link_needs_the_token_and_the_certificate(
    llama_tokenizer: Tokenizer, tmp_path: Path, authority: trustme.CA
) -> None:
    tls = files(tmp_path / "link", authority, LINK_NAME, ca=True)
    engine = FakeEngine(echo)
    card = make_card(llama_tokenizer, LLAMA3)
    link = LinkServer(engine, card, token="right", tls=tls.link_server("link_tls"))
    engine.on_outputs = link.on_outputs
    address = await link.start()

    async def ready(config: GatewayConfig, token: str, within_s: float = 1.0) -> bool:
        gateway = Gateway(config)
        await gateway.start()
        await gateway.set_groups([GroupAddress("g0", "tiny", address, token)])
        try:
            await eventually_async(lambda: gateway.ready, within_s)
        except TimeoutError:
            pass
        found = gateway.ready
        await gateway.stop(0)
        return found

    assert await ready(GatewayConfig(link_tls=tls), "right", 10.0)
    assert not await ready(GatewayConfig(link_tls=tls), "wrong")
    assert not await ready(GatewayConfig(), "right")
    await link.stop(0)
    engine.close()


async def test_permission_is_an_error_of_ours(llama_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    key = add_key(path, "acme")
    config = GatewayConfig(keys=path)
    async with serve(make_card(llama_tokenizer, LLAMA3), echo, config=config) as stack:
        with pytest.raises(PermissionDenied, match="metrics"):
            stack.gateway.inference.admission.check_metrics(f"Bearer {key}")
