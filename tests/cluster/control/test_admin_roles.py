"""Roles of admin tokens, and the audit log, over Admin's real server without Ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from arriero.cluster.control.admin_client import AdminClient
from arriero.cluster.control.admin_guard import AdminGuard
from arriero.cluster.control.admin_roles import (
    NEEDED,
    NEEDED_BY_ACTION,
    AdminToken,
    AdminTokens,
    Role,
    check_spec,
    needed_role,
    set_caller,
)
from arriero.cluster.control.audit_log import AuditedCall, AuditLog, summary
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.router.proto.arriero.v1.admin_pb2_grpc import AdminServicer
from arriero.shards.errors import (
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from arriero.shards.protocol import wire

SERVICE = pb.DESCRIPTOR.services_by_name["Admin"]
MODEL = {"name": "m", "path": "/models/m"}


def tokens_of(*roles: Role) -> tuple[AdminTokens, list[tuple[AdminToken, ...]]]:
    """Tokens without Ray's store: `up`, and one for each role; secrets are the roles' names."""
    saved: list[tuple[AdminToken, ...]] = []
    entries = [AdminToken.of(role.word, role, f"secret of {role.word}") for role in roles]
    first = AdminToken.of("up", Role.OWN, "secret of up")
    return AdminTokens(first, lambda: [first, *entries], saved.append), saved


def test_every_rpc_has_a_role() -> None:
    assert set(NEEDED) == set(SERVICE.methods_by_name)
    assert {rpc for rpc, _ in NEEDED_BY_ACTION} <= set(NEEDED)
    assert needed_role("AnRpcOfLater") is Role.OWN  # what no table lists is closed


def test_reading_needs_the_lowest_role_and_secrets_the_highest() -> None:
    for rpc in NEEDED:
        reads = rpc.startswith(("Get", "List")) or rpc in ("Why", "Logs")
        assert (NEEDED[rpc] is Role.VIEW) == reads, rpc
    for rpc in ("Keys", "Tokens", "RotateToken"):
        assert NEEDED[rpc] is Role.OWN
    assert needed_role("Kv", "stats") is Role.VIEW and needed_role("Kv", "flush") is Role.OPERATE


def test_tokens_are_stored_as_hashes_and_end() -> None:
    tokens, saved = tokens_of()
    secret, token = tokens.add("ci", Role.OPERATE, 0.0)
    assert tokens.find(f"Bearer {secret}") == token
    assert secret not in repr(saved) and "secret of up" not in repr(saved)
    short, _ = tokens.add("short", Role.VIEW, 0.05)
    assert tokens.find(f"Bearer {short}").name == "short"
    time.sleep(0.06)
    for wrong in ("", secret, f"Basic {secret}", f"Bearer {secret}x", f"Bearer {short}"):
        with pytest.raises(Unauthenticated):
            tokens.find(wrong)
    tokens.revoke("ci")
    with pytest.raises(Unauthenticated):
        tokens.find(f"Bearer {secret}")
    with pytest.raises(NotFound, match="admin-token list"):
        tokens.revoke("ci")


def test_tokens_survive_the_store() -> None:
    tokens, saved = tokens_of(Role.VIEW)
    tokens.add("ci", Role.OPERATE, 3600.0)
    stored = json.loads(json.dumps(wire.to_builtins(saved[-1])))
    assert wire.from_builtins(stored, tuple[AdminToken, ...]) == saved[-1]


def test_the_last_owner_stays() -> None:
    tokens, _ = tokens_of(Role.VIEW)
    with pytest.raises(InvalidRequest, match="last token with the role own"):
        tokens.revoke("up")
    secret, _ = tokens.add("boss", Role.OWN, 0.0)
    tokens.revoke("up")
    assert [token.name for token in tokens.entries()] == ["view", "boss"]
    again = tokens.rotate("boss", 0.0)
    assert tokens.find(f"Bearer {again}").role is not None
    with pytest.raises(Unauthenticated):
        tokens.find(f"Bearer {secret}")
    old = tokens.rotate("boss", 60.0)
    assert tokens.find(f"Bearer {again}").name == tokens.find(f"Bearer {old}").name == "boss"
    for name in ("", "a b", "x" * 65, "boss"):
        with pytest.raises(InvalidRequest, match="`name`"):
            tokens.add(name, Role.VIEW, 0.0)


def test_keys_and_certificates_are_the_owners(tmp_path: Path) -> None:
    before = DeploymentSpec.model_validate({"models": [MODEL]})
    keys = {"models": [MODEL], "gateway": {"keys": str(tmp_path / "keys.yaml")}}
    groups = {"models": [MODEL | {"groups": 2}], "log_level": "debug"}
    set_caller(AdminToken.of("ci", Role.OPERATE, "x"))
    check_spec(before, DeploymentSpec.model_validate(groups))
    with pytest.raises(PermissionDenied, match=r"`gateway.keys`: the admin token 'ci'"):
        check_spec(before, DeploymentSpec.model_validate(keys))
    set_caller(AdminToken.of("up", Role.OWN, "x"))
    check_spec(before, DeploymentSpec.model_validate(keys))


class Guarded(AdminServicer):
    """Answers every RPC with nothing; `Drain` finds nothing, `Logs` of "x" breaks off."""


@asynccontextmanager
async def guarded(folder: Path) -> AsyncIterator[tuple[str, Path]]:
    """Every RPC of Admin behind the guard; gives the address and the audit log."""
    tokens, _ = tokens_of(Role.VIEW, Role.OPERATE)
    path = folder / "audit" / "log.jsonl"
    audit = AuditLog(path, max_bytes=10**6, keep=2)
    server = grpc.aio.server(interceptors=(AdminGuard(tokens, audit),))

    async def answer(raw: bytes, context: Any) -> bytes:  # noqa: ANN401
        return b""

    async def missing(raw: bytes, context: Any) -> bytes:  # noqa: ANN401
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such group")
        return b""

    handlers = {
        name: grpc.unary_unary_rpc_method_handler(missing if name == "Drain" else answer)
        for name in SERVICE.methods_by_name
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", path
    finally:
        await server.stop(0)
        audit.close()


async def call(address: str, secret: str, method: Callable[[AdminClient], object]) -> object:
    def run() -> object:
        with AdminClient(address, secret) as client:
            return method(client)

    return await asyncio.to_thread(run)


async def test_each_role_may_call_what_the_table_says(tmp_path: Path) -> None:
    async with (
        guarded(tmp_path) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        for name in SERVICE.methods_by_name:
            for role in (None, *Role):
                secret = "wrong" if role is None else f"secret of {role.word}"
                secret = "secret of up" if role is Role.OWN else secret
                method = channel.unary_unary(f"/{SERVICE.full_name}/{name}")
                expected = grpc.StatusCode.OK
                if role is None:
                    expected = grpc.StatusCode.UNAUTHENTICATED
                elif role < NEEDED[name]:
                    expected = grpc.StatusCode.PERMISSION_DENIED
                elif name == "Drain":
                    expected = grpc.StatusCode.NOT_FOUND
                done = method(b"", metadata=(("authorization", f"Bearer {secret}"),))
                assert await done.code() is expected, (name, role)


async def test_the_audit_log_says_who_did_what(tmp_path: Path) -> None:
    async with guarded(tmp_path) as (address, path):
        await call(address, "secret of operate", lambda client: client.scale("m", 3))
        await call(address, "secret of operate", lambda client: client.status())  # reads: no line
        with pytest.raises(NotFound):
            await call(address, "secret of operate", lambda client: client.drain("m-7"))
        with pytest.raises(PermissionDenied, match="role view; Scale needs the role operate"):
            await call(address, "secret of view", lambda client: client.scale("m", 9))
        with pytest.raises(Unauthenticated):
            await call(address, "guess", lambda client: client.reload("models: secret words"))
        await call(
            address, "secret of up", lambda client: client.rollout("keys: secret words", force=True)
        )
    assert path.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "secret" not in path.read_text()
    assert [(line["who"], line["rpc"], line["outcome"]) for line in lines] == [
        ("operate", "Scale", "OK"),
        ("operate", "Drain", "NOT_FOUND"),
        ("view", "Scale", "PERMISSION_DENIED"),
        ("", "Reload", "UNAUTHENTICATED"),
        ("up", "Rollout", "OK"),
    ]
    assert lines[0]["request"] == {"model": "m", "groups": 3}
    assert lines[0]["role"] == "operate" and lines[0]["from"].startswith("ipv4:127.0.0.1")
    assert lines[1]["request"] == {"name": "m-7"} and lines[1]["text"] == "no such group"
    assert lines[3]["request"] == {}
    assert lines[4]["request"]["spec"].startswith("sha256:") and lines[4]["request"]["force"]
    assert lines[4]["time"].endswith("Z")


def test_prompts_and_secrets_are_digests() -> None:
    request = pb.KvRequest(name="m", action="pin", texts=["my prompt"], pin="guide")
    shown = summary("Kv", request.SerializeToString())
    assert shown["action"] == "pin" and shown["pin"] == "guide" and "prompt" not in repr(shown)
    assert summary("Kv", b"\xff\xff") == {"malformed_bytes": 2}
    keys = pb.KeysRequest(action="add", tenant="acme", note="for Ann", models=["m"])
    shown = summary("Keys", keys.SerializeToString())
    assert (shown["tenant"], shown["models"]) == ("acme", ["m"]) and "Ann" not in repr(shown)


def test_the_log_is_rotated_and_a_flood_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=2000, keep=2)
    known = AuditedCall(who="up", role="own", peer="ipv4:1.2.3.4:5", rpc="Scale", raw=b"")
    for _ in range(40):
        log.write(known, "OK")
    files = sorted(tmp_path.glob("audit.jsonl*"))
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert all(json.loads(line) for file in files for line in file.read_text().splitlines())
    log.close()
    log = AuditLog(tmp_path / "flood.jsonl", max_bytes=10**6, keep=1)
    stranger = AuditedCall(who="", role="", peer="ipv4:1.2.3.4:5", rpc="Scale", raw=b"")
    for _ in range(1000):
        log.write(stranger, "UNAUTHENTICATED")
    log.write(known, "OK")
    lines = (tmp_path / "flood.jsonl").read_text().splitlines()
    assert len(lines) <= 61 and json.loads(lines[-1])["who"] == "up"
    log.close()
