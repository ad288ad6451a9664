"""Access to a Ray cluster: the environment variables that a driver needs.

Ray reads from the environment whether the cluster has a token (`RAY_AUTH_MODE`), the token itself,
and whether processes listen on loopback only. Driver and cluster must agree on all three: without a
required token the cluster does not answer, and with a needless token the workers cannot answer the
driver. A local cluster of ours has a token of its own; to join another cluster, arriero asks the
GCS whether a token is required, and sends the user's own token. Knows environment variables and GCS
addresses; knows nothing of deployments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc

from arriero.cluster.hosts import ray_private
from arriero.shards.errors import SpecError, Unauthenticated, Unavailable

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_KUBERNETES = "RAY_ENABLE_K8S_TOKEN_AUTH"
_TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
"""Ray's variables for the files of a channel with TLS: certificate, key, authorities."""
LOOPBACK = "127.0.0.1"
PROBE_S = 5.0
_CLIENT = "ray://"
_REMEDY = (
    f"set {TOKEN} to the cluster's token, {TOKEN_PATH} to a file that holds it, or copy that file"
    " to ~/.ray/auth_token (`ray get-auth-token` on its head shows the token)"
)

Changes = Mapping[str, str | None]
"""Environment variables to set; None removes a variable."""


def own_cluster(token: str, node_address: str) -> Changes:
    """Environment variables of the processes and drivers of a local cluster of ours.

    Args:
        token: of the cluster; "" for a cluster without a token.
        node_address: address of the node.
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
    """Environment variables of a driver on a running cluster.

    Asks the GCS of the cluster without a token, then with the user's token.

    Args:
        address: as Ray accepts addresses: host:port, "auto" or ray://host:port.

    Raises:
        Unauthenticated: the cluster requires a token, and the user has none or a wrong token.
        Unavailable: no GCS answers at the address.
    """
    token = ray_private.users_token()
    if address.startswith(_CLIENT):  # a client server accepts any token and opens no calls
        return {MODE: "token" if token else "disabled"}
    gcs, loopback_only = _locate(address)
    if not _refuses(gcs, ""):
        return {MODE: "disabled", **_reach(loopback_only)}
    if not token:
        raise Unauthenticated(
            f"the Ray cluster at {address} requires a token, and {_missing()}; {_REMEDY}"
        )
    if _refuses(gcs, token):
        raise Unauthenticated(
            f"the Ray cluster at {address} refuses the token in {_source()}; {_REMEDY}"
        )
    return {MODE: "token", **_reach(loopback_only)}


def gcs_answers(address: str, token: str) -> bool:
    """Whether the GCS at host:port answers a call with this token ("" for none) in `PROBE_S` s."""
    try:
        return not _refuses(address, token)
    except Unavailable:
        return False


def changed(environment: Mapping[str, str], changes: Changes) -> dict[str, str]:
    """A copy of an environment with `changes` applied."""
    others = {name: value for name, value in environment.items() if name not in changes}
    return others | {name: value for name, value in changes.items() if value is not None}


@contextmanager
def applied(changes: Changes) -> Iterator[None]:
    """Apply `changes` to this process; Ray may be imported, but must not be connected."""
    before = {name: os.environ.get(name) for name in changes}
    apply(changes)
    try:
        yield
    finally:
        apply(before)


def apply(changes: Changes) -> None:
    """Apply `changes` to this process, for good; Ray must not be connected."""
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    ray_private.read_environment()


def _reach(loopback_only: bool) -> Changes:
    return {ray_private.LOOPBACK_SWITCH: "0" if loopback_only else None}


def _missing() -> str:
    if path := os.environ.get(TOKEN_PATH):
        return f"{path} ({TOKEN_PATH}) cannot be read or is empty"
    return "this machine has none"


def _source() -> str:
    """The place of the user's token, in the order in which Ray looks."""
    if os.environ.get(TOKEN):
        return TOKEN
    if path := os.environ.get(TOKEN_PATH):
        return f"{path} ({TOKEN_PATH})"
    return "~/.ray/auth_token"


def _locate(address: str) -> tuple[str, bool]:
    """Host:port of a cluster's GCS, and whether the GCS listens on loopback only.

    Ray turns 127.0.0.1 into the machine's own address, where Ray's clusters listen by default.

    Raises:
        Unavailable: the address is "auto", and no cluster runs on this machine.
    """
    try:
        gcs = ray_private.gcs_address(address)
    except (ConnectionError, ValueError) as error:
        raise Unavailable(f"`address`={address!r}: {' '.join(str(error).split())}") from None
    host, _, port = address.rpartition(":")
    on_loopback = f"{LOOPBACK}:{port}"
    if host in (LOOPBACK, "localhost") and (gcs == on_loopback or not _listens(gcs)):
        return on_loopback, True
    return gcs, False


def _listens(address: str) -> bool:
    with _channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=1.0)
        except grpc.FutureTimeoutError:
            return False
    return True


def _refuses(address: str, token: str) -> bool:
    """Whether the GCS at host:port refuses a call with this token ("" for none).

    Raises:
        Unavailable: nothing answers, or the server there is no GCS.
    """
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with _channel(address) as channel:
        check_alive = channel.unary_unary(ray_private.CHECK_ALIVE, bytes, bytes)
        try:
            check_alive(b"", metadata=metadata, timeout=PROBE_S, wait_for_ready=True)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call), "the error of a call has a status code"
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return True
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise Unavailable(
                    f"no Ray cluster at {address}: nothing answers within {PROBE_S:g} s;"
                    " `ray start` prints the address of the GCS (port 6379 by default)"
                ) from None
            raise Unavailable(
                f"no Ray cluster at {address}: the server there is no GCS ({error.details()});"
                " `ray start` prints the address of the GCS (port 6379 by default)"
            ) from None
    return False


def _channel(address: str) -> grpc.Channel:
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address)
    chain, key, authority = (_tls_file(name) for name in _TLS_FILES)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, chain))


def _tls_file(variable: str) -> bytes:
    if not (path := os.environ.get(variable)):
        raise SpecError(f"RAY_USE_TLS is set, so {variable} must name a file; set {variable}")
    return Path(path).read_bytes()
