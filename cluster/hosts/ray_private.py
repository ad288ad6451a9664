"""All calls of Ray's private interfaces; every other module calls Ray's public interface.

Ray may change what is below in any minor release, so pyproject.toml has an upper bound for Ray.
To raise the bound: install the new version, run `make check` and the tests marked `ray`, and set
`TESTED`. Each function says why the public interface is not enough. Ray is
imported inside the functions: a command starts its local cluster before it imports Ray.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

TESTED = ("2.59", "2.60")
"""Minor versions of Ray with all of these interfaces; the tests run with the last."""
LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's variable for clusters of several nodes; "0" makes a node at 127.0.0.1 bind to loopback."""
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""gRPC method of the GCS that answers without a registered client."""
METRICS_PORT = "DASHBOARD_METRIC_PORT"
"""Ray's variable for the port of the head's metrics, which ask for no token; "-1" opens none."""
HEAD_PROCESSES = (b"/gcs_server", b"/raylet")
"""Ends of the programs' paths of a head node's two processes."""


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """Free resources by node id and name; publicly Ray gives only the sum of all nodes."""
    from ray._private import state

    nodes: Mapping[str, Mapping[str, float]] = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return nodes


def driver_options(node_address: str | None) -> dict[str, Any]:
    """Arguments of `ray.init` for a driver; publicly a driver cannot choose its own address.

    Args:
        node_address: IP address of this process; None lets Ray choose.
    """
    return {} if node_address is None else {"_node_ip_address": node_address}


def delete_application(name: str) -> None:
    """Start the end of a Serve application; publicly the call waits for the end."""
    from ray import serve

    serve.delete(name, _blocking=False)


def store_value(namespace: bytes, name: bytes, value: bytes) -> None:
    """Store a value in the GCS; publicly only actors and objects store values."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(name, value, overwrite=True, namespace=namespace)


def stored_value(namespace: bytes, name: bytes) -> bytes | None:
    """A value of the GCS, or None."""
    from ray.experimental import internal_kv

    value: bytes | None = internal_kv._internal_kv_get(name, namespace=namespace)
    return value


def remove_value(namespace: bytes, name: bytes) -> None:
    """Remove a value from the GCS; does nothing when there is none."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(name, namespace=namespace)


def read_environment() -> None:
    """Make Ray read its variables again; publicly Ray reads the variables only at import."""
    from ray._private import ray_constants

    raylet = _raylet()
    raylet.Config.initialize("")  # Ray's own order: the lookup of a token depends on the mode
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(LOOPBACK_SWITCH) != "0"


def users_token() -> str:
    """The user's own token, from the places where Ray looks; "" when no token is readable."""
    from ray.exceptions import AuthenticationError

    loader = _raylet().AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        if not loader.has_token(ignore_auth_mode=True):
            return ""
    except AuthenticationError:  # the token path has no readable token
        return ""
    return str(loader.get_raw_token(ignore_auth_mode=True))


def bind_replica_server(host: str) -> None:
    """Bind the gRPC server of this process's Serve replica to one address of its node.

    Publicly the server listens on every interface of the machine. Serve opens the server after the
    constructor of the deployment, which therefore must call this function. A version of Serve
    without the replaced function keeps listening everywhere, where it asks for the cluster's token.

    Args:
        host: IP address at which the cluster knows this node; handles of other processes call it.
    """
    from ray.serve._private import replica

    add_port = getattr(replica, "add_port_to_grpc_server", None)
    if add_port is None:
        return
    bracketed = f"[{host}]" if ":" in host else host

    def add_port_at_host(server: object, address: str) -> int:
        port = address.rpartition(":")[2]
        bound: int = add_port(server, f"{bracketed}:{port}")
        return bound

    setattr(replica, "add_port_to_grpc_server", add_port_at_host)  # noqa: B010


def gcs_address(address: str) -> str:
    """Host:port of the GCS behind an address as `ray.init` takes addresses, without connecting.

    Raises:
        ConnectionError: the address is "auto", and no cluster runs on this machine.
        ValueError: the address has another form.
    """
    from ray._private import services

    return str(services.canonicalize_bootstrap_address(address))


def _raylet() -> Any:  # noqa: ANN401
    """Ray's compiled module, which has no type stubs."""
    return importlib.import_module("ray._raylet")
