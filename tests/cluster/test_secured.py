"""A deployment with certificates and keys everywhere, and what is changed in it while it serves."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme
import yaml

from arriero.cluster import deployment_file as state
from arriero.cluster.control.admin_client import AdminClient
from arriero.router.client.client import Client
from arriero.router.tenants.keys import add_key, read_keys
from arriero.router.tls import LINK_NAME
from arriero.shards.errors import ArrieroError, Overloaded, Unauthenticated, Unavailable
from support.command import arriero

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


@dataclass
class Secured:
    """A deployment that speaks TLS at every door, and asks for keys."""

    folder: Path
    spec: Path
    ca: Path
    keys: Path
    key: str

    @property
    def noted(self) -> state.Deployment:
        found = state.read(self.folder)
        assert found is not None
        return found

    def client(self, key: str) -> Client:
        credentials = grpc.ssl_channel_credentials(self.ca.read_bytes())
        return Client(self.noted.gateway, credentials=credentials, api_key=key, timeout_s=60)

    def arriero(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return arriero(*args, folder=self.folder, check=check)


def write_pair(authority: trustme.CA, folder: Path, *names: str) -> dict[str, str]:
    pair = authority.issue_cert(*names)
    folder.mkdir()
    (folder / "cert.pem").write_bytes(b"".join(one.bytes() for one in pair.cert_chain_pems))
    pair.private_key_pem.write_to_path(folder / "key.pem")
    return {"certificate": f"{folder.name}/cert.pem", "key": f"{folder.name}/key.pem"}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    keys = folder / "keys.yaml"
    key = add_key(keys, "acme")
    text = {
        "models": [{"name": "demo", "path": MODEL, "kv": {"memory": "64MiB"}}],
        "gateway": {
            "port": 0,
            "tls": write_pair(authority, folder / "gateway", "127.0.0.1"),
            "keys": "keys.yaml",
            "tenants": [{"name": "acme"}],
        },
        "link_tls": write_pair(authority, folder / "link", LINK_NAME) | {"ca": "ca.pem"},
        "admin": {
            "tls": write_pair(authority, folder / "admin", "admin.example")
            | {"ca": "ca.pem", "name": "admin.example"}
        },
    }
    spec = folder / "arriero.yaml"
    spec.write_text(yaml.safe_dump(text))
    try:
        arriero("up", str(spec), folder=folder)
        yield Secured(folder=folder, spec=spec, ca=folder / "ca.pem", keys=keys, key=key)
    finally:
        arriero("down", folder=folder)


def test_admin_is_spoken_to_over_tls_alone(secured: Secured) -> None:
    noted = secured.noted
    assert "BEGIN CERTIFICATE" in noted.admin_ca and noted.admin_name == "admin.example"
    told = json.loads(secured.arriero("status", "--json").stdout)
    assert told["models"][0]["settled"]
    other = trustme.CA().cert_pem.bytes().decode()
    for wrong in ({}, {"ca": other, "name": noted.admin_name}, {"ca": noted.admin_ca}):
        # in the clear; another authority's certificate; a certificate for another name
        with AdminClient(noted.admin, noted.admin_token, **wrong) as client:
            with pytest.raises(Unavailable):
                client.status()


def test_the_command_line_shows_certificate_and_key(secured: Secured) -> None:
    asked = ("generate", "The capital of France is", "--max-tokens", "4", "--temperature", "0")
    said = secured.arriero(*asked, "--ca", str(secured.ca), "--api-key", secured.key)
    assert "Paris" in said.stdout
    assert secured.arriero(*asked, check=False).returncode != 0
    with secured.client("arr-000000000000-" + "0" * 64) as client, pytest.raises(Unauthenticated):
        client.models()


def test_a_key_is_rotated_on_every_gateways_node(secured: Secured) -> None:
    """The old key is taken for the overlap, and a call that it began goes on after it."""
    old_id = secured.key.split("-")[1]
    with secured.client(secured.key) as client:
        running = client.generate("Once", max_tokens=200, ignore_eos=True, temperature=0)
        next(running)
        made = json.loads(
            secured.arriero("keys", "rotate", old_id, "--overlap", "6", "--json").stdout
        )
        assert made["tenant"] == "acme" and made["expires"] == 0
        listed = {
            one["id"]: one for one in json.loads(secured.arriero("keys", "list", "--json").stdout)
        }
        left_s = listed[old_id]["expires"] - time.time()
        assert left_s <= 7 and listed[made["id"]]["expires"] == 0
        with secured.client(made["key"]) as new:
            assert new.models()
        if left_s > 1:
            assert client.models()
        time.sleep(max(0.0, left_s) + 1.5)
        assert list(running)[-1].usage.completion_tokens == 200
        with pytest.raises(Unauthenticated, match="has expired"):
            client.models()
    secured.key = made["key"]
    secured.arriero("keys", "revoke", old_id)
    said = secured.arriero("keys", "revoke", old_id, check=False)
    assert said.returncode == 4 and "keys list" in said.stderr
    added = json.loads(secured.arriero("keys", "add", "ops", "--json").stdout)
    assert set(read_keys(secured.keys)) == {made["id"], added["id"]}


def test_admins_token_is_rotated(secured: Secured) -> None:
    before = secured.noted
    with AdminClient.of(before) as old:
        secured.arriero("keys", "rotate-admin", "--overlap", "3600")
        assert secured.noted.admin_token != before.admin_token
        assert old.status()  # for an hour
        secured.arriero("keys", "rotate-admin", "--overlap", "0")
        with pytest.raises(ArrieroError, match="admin token"):
            old.status()
    secured.arriero("status")


def test_a_reload_takes_effect_at_once_or_is_refused_by_name(secured: Secured) -> None:
    text = yaml.safe_load(secured.spec.read_text())
    stream = secured.client(secured.key)
    running = stream.generate("Once", max_tokens=300, ignore_eos=True, temperature=0)
    next(running)
    with AdminClient.of(secured.noted) as admin:
        lives = {one.id for one in admin.status().groups}

    text["models"][0]["kv"]["memory"] = "96MiB"
    text["gateway"]["drain_s"] = 20
    text["health"] = {"canary_s": 2, "hang_s": 8}
    secured.spec.write_text(yaml.safe_dump(text))
    said = secured.arriero("reload", str(secured.spec), check=False)
    assert said.returncode == 2 and "rollout" in said.stderr
    assert "`gateway.drain_s`, `models[demo].kv.memory`" in said.stderr

    text["models"][0]["kv"]["memory"], text["log_level"] = "64MiB", "info"
    del text["gateway"]["drain_s"]
    text["gateway"]["tenants"] = [{"name": "acme", "requests_per_minute": 2}]
    secured.spec.write_text(yaml.safe_dump(text))
    told = json.loads(secured.arriero("reload", str(secured.spec), "--json").stdout)
    for field in ("log_level", "gateway.tenants", "health.canary_s", "health.hang_s"):
        assert field in told["change"]
    deadline_s = time.monotonic() + 20
    with (
        pytest.raises(Overloaded, match="requests_per_minute"),
        secured.client(secured.key) as client,
    ):
        while time.monotonic() < deadline_s:
            list(client.generate("a", max_tokens=1))
    assert list(running)[-1].usage.completion_tokens == 300  # it ran on through all of that
    stream.close()

    text["admin"]["port"] = 9
    secured.spec.write_text(yaml.safe_dump(text))
    for command in ("reload", "rollout"):
        said = secured.arriero(command, str(secured.spec), check=False)
        assert said.returncode == 2 and "`admin.port`" in said.stderr and "down" in said.stderr
    with AdminClient.of(secured.noted) as admin:
        assert {one.id for one in admin.status().groups} == lives


def test_a_rollout_replaces_gateways_where_only_they_change(secured: Secured) -> None:
    text = yaml.safe_load(secured.spec.read_text())
    text["admin"].pop("port", None)
    text["gateway"]["drain_s"] = 2
    text["gateway"]["tenants"] = []
    secured.spec.write_text(yaml.safe_dump(text))
    with AdminClient.of(secured.noted) as admin:
        before = admin.status()
        secured.arriero("rollout", str(secured.spec))
        after = admin.status()
        assert len(after.gateways) == 1 and after.gateways[0].pid != before.gateways[0].pid
        assert [one.id for one in after.groups] == [one.id for one in before.groups]
        assert secured.noted.gateway == after.gateways[0].address
        (log,) = admin.logs("gateways", 5)
        assert log.pid == after.gateways[0].pid
    with secured.client(secured.key) as client:
        assert client.models()
