"""The console without a browser: its files, their headers, and who may read the cluster."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from arriero.router.gateway import GatewayConfig
from arriero.router.http.console import routes, static_files
from arriero.router.tenants.keys import add_key
from arriero.shards.errors import PermissionDenied, Unauthenticated
from support.frontdoor import LLAMA3, Stack, echo, make_card, serve

VENDOR = static_files.FOLDER / "vendor"
OWN = [file for file in static_files.FOLDER.iterdir() if file.is_file()]
TOKEN = "Bearer admin-token"
STATE = '{"at":1,"status":{}}'


async def read_cluster(authorization: str) -> str:
    """As the operator: a token of Admin reads, another caller is refused."""
    if authorization == "Bearer too-low":
        raise PermissionDenied("the role is too low")
    if authorization != TOKEN:
        raise Unauthenticated("the cluster's state needs an admin token")
    return STATE


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    return path, add_key(path, "tenant", "")


@pytest.fixture
async def guarded(
    llama_tokenizer: Tokenizer, key_file: tuple[Path, str]
) -> AsyncIterator[tuple[Stack, httpx.AsyncClient]]:
    """A gateway that asks for API keys and serves the console."""
    config = GatewayConfig(http_address="127.0.0.1:0", console=True, keys=key_file[0])
    card = make_card(llama_tokenizer, LLAMA3)
    async with serve(card, echo, config=config, read_cluster=read_cluster) as stack:
        async with httpx.AsyncClient(base_url=url(stack)) as ask:
            yield stack, ask


def url(stack: Stack) -> str:
    return f"http://127.0.0.1:{stack.gateway.http_port}"


async def raw_status(stack: Stack, target: str) -> tuple[int, bytes]:
    """Status and body for a request line as it stands; clients would tidy the path up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.gateway.http_port)
    writer.write(f"GET {target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


async def test_the_page_needs_no_key_and_binds_the_browser(
    guarded: tuple[Stack, httpx.AsyncClient],
) -> None:
    _, ask = guarded
    page = await ask.get("/console")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    rules = dict(
        rule.strip().partition(" ")[::2]
        for rule in page.headers["content-security-policy"].split(";")
    )
    script = re.search(r'<script type="importmap">(.*?)</script>', page.text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'self' 'sha256-{digest}'"
    assert rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"\son\w+=|style=", page.text)


async def test_every_file_is_served_with_its_type_and_kept_by_browsers(
    guarded: tuple[Stack, httpx.AsyncClient],
) -> None:
    _, ask = guarded
    served = static_files.paths()
    assert len(served) > 30
    for path in served:
        answer = await ask.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["x-content-type-options"] == "nosniff"
        if path.endswith((".js", ".mjs")):
            assert answer.headers["content-type"].startswith("text/javascript")
        assert answer.headers["content-encoding"] == "gzip"
        again = await ask.get(path, headers={"if-none-match": f'"x", {answer.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
    plain = await ask.get("/console/main.js", headers={"accept-encoding": "identity"})
    file = static_files.read("/console/main.js")
    assert file is not None and gzip.decompress(file.zipped) == plain.content
    assert (await ask.head("/console")).content == b""
    slash = await ask.get("/console/")  # relative links would lead elsewhere
    assert slash.status_code == 308 and slash.headers["location"] == "../console"


@pytest.mark.parametrize(
    "target",
    [
        "/console/../static_files.py", "/console/%2e%2e/static_files.py",
        "/console/..%2fstatic_files.py", "/console/vendor/../../routes.py",
        "/console/..\\static_files.py", "/console//etc/passwd", "/console/%2fetc%2fpasswd",
        "/console/vendor", "/console/main.js%00.html", "/console/MAIN.JS", "/console/none.js",
        "/console/vendor/versions.json", "/console/../../../../../../etc/passwd",
    ],
)  # fmt: skip
async def test_no_path_leaves_the_folder(llama_tokenizer: Tokenizer, target: str) -> None:
    config = GatewayConfig(http_address="127.0.0.1:0", console=True)
    async with serve(make_card(llama_tokenizer, LLAMA3), echo, config=config) as stack:
        status, body = await raw_status(stack, target)
        assert status == 404, body
        assert b"import" not in body and b"root:" not in body


async def test_a_key_is_needed_for_all_else(
    guarded: tuple[Stack, httpx.AsyncClient], key_file: tuple[Path, str]
) -> None:
    stack, ask = guarded
    for path in ("/v1/models", "/console/none", "/consoles", "/console/cluster.json"):
        assert (await ask.get(path)).status_code == 401, path
    assert (await raw_status(stack, "/console/%2e%2e/v1/models"))[0] == 401
    with_key = {"authorization": f"Bearer {key_file[1]}"}
    assert (await ask.get("/v1/models", headers=with_key)).status_code == 200


async def test_the_cluster_is_for_holders_of_admin_tokens(
    guarded: tuple[Stack, httpx.AsyncClient], key_file: tuple[Path, str]
) -> None:
    _, ask = guarded
    path = "/console/cluster.json"
    for given, status in ((f"Bearer {key_file[1]}", 401), ("Bearer too-low", 403), (TOKEN, 200)):
        answer = await ask.get(path, headers={"authorization": given})
        assert answer.status_code == status
        assert (STATE == answer.text) == (status == 200)
    assert answer.headers["cache-control"] == "no-store"
    assert (await ask.post(path, json={}, headers={"authorization": TOKEN})).status_code == 405


async def test_few_reads_of_the_cluster_run_at_once(llama_tokenizer: Tokenizer) -> None:
    go = asyncio.Event()

    async def slow(authorization: str) -> str:
        await go.wait()
        return STATE

    config = GatewayConfig(http_address="127.0.0.1:0", console=True)
    card = make_card(llama_tokenizer, LLAMA3)
    async with (
        serve(card, echo, config=config, read_cluster=slow) as stack,
        httpx.AsyncClient(base_url=url(stack), headers={"authorization": TOKEN}) as ask,
    ):
        reads = [
            asyncio.create_task(ask.get("/console/cluster.json"))
            for _ in range(routes.MOST_AT_ONCE + 2)
        ]
        await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
        go.set()
        statuses = sorted([(await read).status_code for read in reads])
        assert statuses == [200] * routes.MOST_AT_ONCE + [429] * 2


async def test_without_the_setting_there_is_no_console(
    llama_tokenizer: Tokenizer, key_file: tuple[Path, str]
) -> None:
    card = make_card(llama_tokenizer, LLAMA3)
    for keys, status in ((None, 404), (key_file[0], 401)):
        config = GatewayConfig(http_address="127.0.0.1:0", keys=keys)
        async with serve(card, echo, config=config) as stack:
            async with httpx.AsyncClient(base_url=url(stack)) as ask:
                for path in ("/console", "/console/main.js"):
                    assert (await ask.get(path)).status_code == status
                token = {"authorization": TOKEN}
                assert (await ask.get("/console/cluster.json", headers=token)).status_code == 404


async def test_a_gateway_without_a_cluster_says_so(llama_tokenizer: Tokenizer) -> None:
    config = GatewayConfig(http_address="127.0.0.1:0", console=True)
    async with serve(make_card(llama_tokenizer, LLAMA3), echo, config=config) as stack:
        async with httpx.AsyncClient(base_url=url(stack)) as ask:
            token = {"authorization": TOKEN}
            answer = await ask.get("/console/cluster.json", headers=token)
            assert answer.status_code == 403 and "no deployment" in answer.text


def test_vendored_files_are_the_published_ones_with_their_licences() -> None:
    packages = json.loads((VENDOR / "versions.json").read_text())
    listed = {name: digest for package in packages for name, digest in package["files"].items()}
    files = {file for file in VENDOR.iterdir() if file.suffix in (".mjs", ".js", ".css")}
    assert {file.name for file in files} == set(listed)
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == listed[file.name], file.name
    for package in packages:
        assert (VENDOR / f"{package['name']}.LICENSE").read_text().strip()
        assert package["version"] and package["license"]


def test_own_files_are_short_and_name_no_other_host() -> None:
    for file in OWN:
        text = file.read_text()
        assert len(text.splitlines()) < 400, file.name
        addresses = set(re.findall(r"https?://[\w.]+", text))
        assert addresses <= {"http://www.w3.org"}, file.name  # the namespace of SVG
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", text)


def test_the_package_takes_all_files() -> None:
    """`pyproject.toml` lists `static/*` and `static/vendor/*`."""
    folders = {file.parent for file in static_files.FOLDER.rglob("*") if file.is_file()}
    assert folders == {static_files.FOLDER, VENDOR}
