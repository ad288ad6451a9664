"""How a process gets at a Ray cluster: the environment that it must connect with.

Ray reads from the environment whether a cluster asks for a token (`RAY_AUTH_MODE`), which one, and
whether its processes listen on loopback alone. Driver and cluster must agree on all of it: with a
token too few the cluster answers nothing, with one too many its workers cannot answer the driver.
Our own local clusters have a token of their own; a cluster that is joined is asked what it wants,
and gets the user's own token. Knows environments and GCS addresses; knows nothing of deployments.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc

from arriero.shards.errors import Unauthenticated, Unavailable

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_KUBERNETES = "RAY_ENABLE_K8S_TOKEN_AUTH"
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's name for: may have several nodes. Without, a node at 127.0.0.1 binds to loopback alone."""
LOOPBACK = "127.0.0.1"
PROBE_S = 10.0
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CLIENT = "ray://"
_REMEDY = (
    f"set {TOKEN} to the cluster's token, {TOKEN_PATH} to a file that holds it, or copy that file"
    " to ~/.ray/auth_token (`ray get-auth-token` on its head shows the token)"
)

Changes = Mapping[str, str | None]
"""Variables of the environment to set, or with None to take out."""


def own_cluster(token: str, node_address: str) -> Changes:
    """What the processes and drivers of a local cluster of ours run with.

    Args:
        token: of this cluster; "" for one that was started without.
        node_address: of its node.
    """
    if not token:
        return {MODE: "disabled", **_reach(node_address == LOOPBACK)}
    return {
        MODE: "token",
        TOKEN: token,
        TOKEN_PATH: None,
        _KUBERNETES: None,
        **_reach(node_address == LOOPBACK),
    }


def joined_cluster(address: str) -> Changes:
    """What a driver needs on a cluster of others: asks its GCS, with and without the user's token.

    Args:
        address: as Ray takes it: host:port, "auto" or ray://host:port.

    Raises:
        Unauthenticated: it wants a token, and the user has none, or another.
        Unavailable: no GCS answers there.
    """
    token = _users_token()
    if address.startswith(_CLIENT):  # its server takes a token, wanted or not, and calls nobody
        return {MODE: "token" if token else "disabled"}
    at, loopback_only = _locate(address)
    if not _refuses(at, ""):
        return {MODE: "disabled", **_reach(loopback_only)}
    if not token:
        raise Unauthenticated(
            f"the Ray cluster at {address} asks for a token, and {_missing()}; {_REMEDY}"
        )
    if _refuses(at, token):
        raise Unauthenticated(
            f"the Ray cluster at {address} asks for another token than {_source()}; {_REMEDY}"
        )
    return {MODE: "token", **_reach(loopback_only)}


def changed(environment: Mapping[str, str], changes: Changes) -> dict[str, str]:
    """An environment with `changes` made."""
    made = {name: value for name, value in environment.items() if name not in changes}
    return made | {name: value for name, value in changes.items() if value is not None}


@contextmanager
def applied(changes: Changes) -> Iterator[None]:
    """Make `changes` in this process, which may have Ray loaded but not connected."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(changes: Changes) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _reload()


def _reload() -> None:
    """Have Ray read the environment again; it does so by itself only when it is imported."""
    from ray._private import ray_constants

    raylet = _raylet()
    raylet.Config.initialize("")  # in this order, as Ray itself: a token is looked up by the mode
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(_CLUSTERS) != "0"


def _raylet() -> Any:  # noqa: ANN401
    """Ray's compiled part, which has no stubs."""
    return importlib.import_module("ray._raylet")


def _reach(loopback_only: bool) -> Changes:
    return {_CLUSTERS: "0" if loopback_only else None}


def _users_token() -> str:
    """The user's own token, from where Ray looks for one; "" for none that can be read."""
    from ray.exceptions import AuthenticationError

    loader = _raylet().AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        if not loader.has_token(ignore_auth_mode=True):
            return ""
    except AuthenticationError:  # a path is named, and no token is there
        return ""
    return str(loader.get_raw_token(ignore_auth_mode=True))


def _missing() -> str:
    if path := os.environ.get(TOKEN_PATH):
        return f"{path} ({TOKEN_PATH}) cannot be read or is empty"
    return "there is none here"


def _source() -> str:
    """Where the user's token is from, in the order in which Ray looks."""
    if os.environ.get(TOKEN):
        return f"that in {TOKEN}"
    if path := os.environ.get(TOKEN_PATH):
        return f"that in {path} ({TOKEN_PATH})"
    return "that in ~/.ray/auth_token"


def _locate(address: str) -> tuple[str, bool]:
    """Where to ask a cluster's GCS, and whether it listens on loopback alone.

    For 127.0.0.1 Ray reads the machine's own address, where its clusters listen by default.

    Raises:
        Unavailable: "auto", and none runs on this machine.
    """
    from ray._private import services

    try:
        at = services.canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError) as error:
        raise Unavailable(f"`address`={address!r}: {' '.join(str(error).split())}") from None
    host, _, port = address.rpartition(":")
    on_loopback = f"{LOOPBACK}:{port}"
    if host in (LOOPBACK, "localhost") and at != on_loopback and not _listens(str(at)):
        return on_loopback, True
    return str(at), False


def _listens(at: str) -> bool:
    with _channel(at) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=1.0)
        except grpc.FutureTimeoutError:
            return False
    return True


def _refuses(at: str, token: str) -> bool:
    """Whether the GCS at host:port refuses a call with this token ("" for none).

    Raises:
        Unavailable: nothing answers, or something that is no GCS.
    """
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with _channel(at) as channel:
        ask = channel.unary_unary(_ALIVE, bytes, bytes)
        try:
            ask(b"", metadata=metadata, timeout=PROBE_S, wait_for_ready=True)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call), "a call's error says how it ended"
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return True
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise Unavailable(
                    f"no Ray cluster at {at}: nothing answers within {PROBE_S:g} s; `ray start`"
                    " prints the address of its GCS (port 6379 by default)"
                ) from None
            raise Unavailable(
                f"no Ray cluster at {at}: what listens there is no GCS ({error.details()});"
                " `ray start` prints its address (port 6379 by default)"
            ) from None
    return False


def _channel(at: str) -> grpc.Channel:
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(at)
    from ray._common.tls_utils import load_certs_from_env

    chain, key, authority = load_certs_from_env()  # type: ignore[no-untyped-call]
    return grpc.secure_channel(at, grpc.ssl_channel_credentials(authority, key, chain))
