"""Tokens of Ray clusters: our own, and those of clusters that are joined, against a GCS's words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from arriero.cluster import deployment_file as state
from arriero.cluster.hosts import local_cluster as local
from arriero.cluster.hosts import ray_access
from arriero.shards.errors import Unauthenticated, Unavailable

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's, when it is imported
MODE, TOKEN, TOKEN_PATH = ray_access.MODE, ray_access.TOKEN, ray_access.TOKEN_PATH
GCS = "ray.rpc.NodeInfoGcsService"


@contextmanager
def gcs(token: str) -> Iterator[str]:
    """A cluster's door, at loopback alone: asks for `token`, "" for none; gives its address."""

    def check_alive(request: bytes, context: grpc.ServicerContext) -> bytes:
        given = dict(context.invocation_metadata()).get("authorization", "")
        if token and given != f"Bearer {token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    methods = {"CheckAlive": grpc.unary_unary_rpc_method_handler(check_alive)}
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(GCS, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without any token."""
    for name in (MODE, TOKEN, TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def in_file(path: Path, token: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(token + "\n")
    return path


def in_home(home: Path, token: str) -> None:
    in_file(home / ".ray" / "auth_token", token)


@pytest.mark.parametrize("mode", [None, "token", "disabled"])
@pytest.mark.parametrize("wanted", ["", "right"])
def test_the_mode_is_the_clusters_whatever_lies_around(
    home: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, wanted: str
) -> None:
    in_home(home, "right")
    if mode is not None:
        monkeypatch.setenv(MODE, mode)
    with gcs(wanted) as address:
        access = ray_access.joined_cluster(address)
    assert access[MODE] == ("token" if wanted else "disabled")
    assert TOKEN not in access  # Ray finds it where we did


def by_variable(home: Path, patch: pytest.MonkeyPatch, token: str) -> None:
    in_home(home, "another")
    patch.setenv(TOKEN, token)


def by_path(home: Path, patch: pytest.MonkeyPatch, token: str) -> None:
    in_home(home, "another")
    patch.setenv(TOKEN_PATH, str(in_file(home / "token", token)))


@pytest.mark.parametrize("give", [by_variable, by_path])
def test_the_users_token_is_found_in_rays_order(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    give: Callable[[Path, pytest.MonkeyPatch, str], None],
) -> None:
    with gcs("right") as address:
        give(home, monkeypatch, "right")
        assert ray_access.joined_cluster(address)[MODE] == "token"
        give(home, monkeypatch, "wrong")
        with pytest.raises(Unauthenticated, match=r"refuses the token in .*RAY_AUTH_TOKEN"):
            ray_access.joined_cluster(address)


def test_a_token_too_few_is_said_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE, "token")  # with which Ray itself ends the process
    with gcs("right") as address:
        with pytest.raises(Unauthenticated, match=r"has none; set RAY_AUTH_TOKEN"):
            ray_access.joined_cluster(address)
        monkeypatch.setenv(TOKEN_PATH, str(home / "nowhere"))
        with pytest.raises(Unauthenticated, match=r"nowhere \(RAY_AUTH_TOKEN_PATH\) cannot be"):
            ray_access.joined_cluster(address)
    with gcs("") as address:
        assert ray_access.joined_cluster(address)[MODE] == "disabled"


def test_no_cluster_and_no_gcs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_access, "PROBE_S", 0.5)
    with pytest.raises(Unavailable, match="nothing answers within"):
        ray_access.joined_cluster("127.0.0.1:9")
    with pytest.raises(Unavailable, match="`address`='nonsense'"):
        ray_access.joined_cluster("nonsense")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(Unavailable, match="no GCS"):
        ray_access.joined_cluster(f"127.0.0.1:{port}")
    server.stop(None)


def test_our_own_clusters_are_apart_from_the_users(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_home(home, "users")
    theirs = {MODE: "disabled", TOKEN: "users", TOKEN_PATH: "/users", "PATH": "/bin"}
    made = ray_access.changed(theirs, ray_access.own_cluster("ours", "127.0.0.1"))
    assert (made[MODE], made[TOKEN], made["PATH"]) == ("token", "ours", "/bin")
    assert TOKEN_PATH not in made
    cluster = local.LocalCluster(session=1, folder=home, node_address="127.0.0.1", token="ours")
    assert "ours" not in repr(cluster)
    from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

    loader = AuthenticationTokenLoader.instance()
    for token in ("ours", "others"):  # one process may speak to both, one after the other
        with ray_access.applied(ray_access.own_cluster(token, "127.0.0.1")):
            assert get_authentication_mode() == AuthenticationMode.TOKEN
            assert loader.get_raw_token() == token
        assert get_authentication_mode() == AuthenticationMode.DISABLED
        assert MODE not in os.environ and TOKEN not in os.environ


def test_the_state_folder_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    state.write(folder, state.Deployment(ray_address="h:1", ray_token="secret"))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "deployment.json").stat().st_mode & 0o777 == 0o600
    read = state.read(folder)
    assert read is not None and read.ray_token == "secret"
