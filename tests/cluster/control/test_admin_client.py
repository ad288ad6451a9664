"""The client of Admin gives a definite answer in seconds when Admin is gone or stands still."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from arriero.cluster.control import admin_client
from arriero.cluster.control.admin_client import AdminClient
from arriero.router.proto.arriero.v1 import admin_pb2 as pb
from arriero.router.proto.arriero.v1.admin_pb2_grpc import (
    AdminServicer,
    add_AdminServicer_to_server,
)
from arriero.shards.errors import Unavailable

CALLS: dict[str, Callable[[AdminClient], object]] = {
    "status": lambda client: client.status(),
    "scale": lambda client: client.scale("m", 1),
    "rollout": lambda client: client.rollout(),
    "keys": lambda client: client.keys("list"),
}


class Frozen(AdminServicer):
    """An Admin whose event loop stands still."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.Status:
        self.released.wait(30)
        return pb.Status()

    ListEvents = Scale = Rollout = Keys = GetStatus  # type: ignore[assignment]


@pytest.fixture
def frozen() -> Iterator[str]:
    servicer = Frozen()
    server = grpc.server(ThreadPoolExecutor(2))
    add_AdminServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    servicer.released.set()
    server.stop(None).wait()


def test_the_limit_leaves_time_for_the_command() -> None:
    assert admin_client.TIMEOUT_S < 10


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_frozen_admin_is_an_error_in_time(
    call: Callable[[AdminClient], object], frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_client, "TIMEOUT_S", 0.5)
    start_s = time.monotonic()
    with AdminClient(frozen, "token") as client:
        with pytest.raises(Unavailable, match=r"gave no answer in 0.5 s; .*`arriero down`"):
            call(client)
    assert time.monotonic() - start_s < 5


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_admin_that_is_gone_is_an_error_at_once(call: Callable[[AdminClient], object]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    start_s = time.monotonic()
    with AdminClient(f"127.0.0.1:{port}", "token") as client:
        with pytest.raises(Unavailable, match=r"cannot be reached .*`arriero down`"):
            call(client)
    assert time.monotonic() - start_s < 5
