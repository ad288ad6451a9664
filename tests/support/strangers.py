"""What a server says to somebody without a credential: every protocol of a deployment is tried.

HTTP and gRPC (each method that Ray, Ray Serve and arriero have), both in the clear and over TLS,
ZeroMQ, torch's store, the link of a leader. Knows protocols; knows nothing of who listens where.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import grpc

WAIT_S = 5.0
CALL_S = 15.0
"""Seconds for a gRPC call: a server that refuses does so at once, unless the machine is busy."""
PATHS = (
    "/", "/health", "/openapi.json", "/metrics", "/v1/models", "/console",
    "/console/cluster.json", "/api/healthz",
    "/api/gcs_healthz", "/api/local_raylet_healthz", "/api/version", "/api/jobs/",
    "/api/serve/applications/", "/api/v0/nodes", "/nodes?view=summary", "/logs", "/events",
    "/-/routes", "/-/healthz",
)  # fmt: skip
"""Paths that the HTTP servers of Ray, Ray Serve and arriero have, all of them for GET."""
ALIVE = (
    "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch",
    "/api/healthz", "/api/gcs_healthz", "/api/local_raylet_healthz",
)  # fmt: skip
"""Paths and methods that say no more than whether a process is well."""
Verdict = Literal["refuses", "answers", "alive", "silent"]
Metadata = tuple[tuple[str, str], ...]
_PACKAGES = ("ray.core.generated", "ray.serve.generated", "arriero.router.proto.arriero.v1")
_NOT_GENERATED = [
    f"/ray.rpc.ObjectManagerService/{name}" for name in ("Push", "Pull", "FreeObjects")
]
"""Methods of Ray that its package describes in no module."""
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_NULL, _CURVE = b"NULL", b"CURVE"
_ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + _NULL.ljust(20, b"\0") + bytes(32)


@dataclass(frozen=True)
class Answer:
    """What came of the tries with a port.

    Attributes:
        protocol: of the server: "http", "grpc", "https", "grpc over tls", "zeromq",
            "torch store", "link"; "" if no protocol fits.
        verdict: "refuses": asks for a credential; "answers": gave something without one;
            "alive": gave only what is in `ALIVE`; "silent": took the connection, and said nothing
            to any protocol.
        detail: paths and methods that answered; else how the server refused.
    """

    protocol: str
    verdict: Verdict
    detail: str = ""


def try_port(host: str, port: int) -> list[Answer]:
    """Try every protocol; gives an answer for each that fits, or one that is silent.

    A server whose protocol is known is not tried with others: a frame that it cannot read would
    tell nothing.
    """
    answers = [*_tries(host, port)]
    return answers or [Answer("", "silent")]


def _tries(host: str, port: int) -> Iterator[Answer]:
    if (http := try_http(host, port, tls=False)) is not None:
        yield http
        return
    channel = grpc.insecure_channel(f"{host}:{port}")
    if (plain := try_grpc(channel, "grpc")) is not None:
        yield plain
        return
    if (certificate := _certificate(host, port)) is not None:
        if (https := try_http(host, port, tls=True)) is not None:
            yield https
        trust = grpc.ssl_channel_credentials(certificate.encode())
        options = [("grpc.ssl_target_name_override", _name_of(certificate))]
        channel = grpc.secure_channel(f"{host}:{port}", trust, options)
        if (secure := try_grpc(channel, "grpc over tls")) is not None:
            yield secure
        return
    others: tuple[Callable[[str, int], Answer | None], ...] = (try_zeromq, try_store, try_link)
    for attempt in others:
        if (answer := attempt(host, port)) is not None:
            yield answer
            return


def try_http(host: str, port: int, *, tls: bool) -> Answer | None:
    """GET of every path; None if the server speaks no HTTP/1."""
    statuses: dict[str, int] = {}
    for path in PATHS:
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        said = _exchange(host, port, head.encode(), tls=tls)
        match = re.match(rb"HTTP/1\.\d (\d{3})", said)
        if match is None:
            return None
        statuses[path] = int(match[1])
    given = [path for path, status in statuses.items() if status < 400]
    refused = sum(status in (401, 403) for status in statuses.values())
    return _judge("https" if tls else "http", {path: path for path in given}, refused)


def try_grpc(channel: grpc.Channel, name: str) -> Answer | None:
    """A call of every method that is known, with an empty message; None if it is no gRPC server."""
    with channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=WAIT_S)
        except grpc.FutureTimeoutError:
            return None
        codes = {method: _call(channel, method) for method in methods()}
    given = {
        method: f"{method} ({code.name})"
        for method, code in codes.items()
        if code not in (*_REFUSED, grpc.StatusCode.UNIMPLEMENTED)
    }
    return _judge(name, given, sum(code in _REFUSED for code in codes.values()))


def _judge(protocol: str, given: Mapping[str, str], refused: int) -> Answer:
    """The answer of a server: what it gave (texts by path or method), and how often it refused."""
    if more := [text for name, text in given.items() if name not in ALIVE]:
        return Answer(protocol, "answers", " ".join(more))
    if refused:
        return Answer(protocol, "refuses", f"{refused} paths or methods refuse")
    return Answer(protocol, "alive" if given else "silent")


def code_of(port: int, method: str, metadata: Metadata) -> grpc.StatusCode:
    """The status of one call of a server on loopback."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        return _call(channel, method, metadata)


def _call(channel: grpc.Channel, method: str, metadata: Metadata = ()) -> grpc.StatusCode:
    """The status of a call with an empty message."""
    call = channel.unary_stream(method)(b"", timeout=CALL_S, metadata=metadata)
    try:
        next(iter(call), None)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call), "the error of a call has a status code"
        return error.code()
    finally:
        call.cancel()
    return grpc.StatusCode.OK


@functools.cache
def methods() -> tuple[str, ...]:
    """Every gRPC method of Ray, Ray Serve and arriero; the first call imports all of these."""
    found = [name for name in ALIVE if name.startswith("/grpc.")] + _NOT_GENERATED
    for package in _PACKAGES:
        folder = importlib.import_module(package).__path__
        for module in pkgutil.iter_modules(folder, f"{package}."):
            if not module.name.endswith("_pb2"):
                continue
            for service in importlib.import_module(
                module.name
            ).DESCRIPTOR.services_by_name.values():
                found += [f"/{service.full_name}/{method.name}" for method in service.methods]
    return tuple(found)


def try_zeromq(host: str, port: int) -> Answer | None:
    """ZeroMQ's greeting, which asks for a connection without security."""
    said = _exchange(host, port, _ZMTP_GREETING)
    if said[:1] != b"\xff" or b"\x7f" not in said[:10]:
        return None
    if said[12:32].rstrip(b"\0") == _CURVE:
        return Answer("zeromq", "refuses", "the server's mechanism is CURVE")
    return Answer("zeromq", "answers", f"mechanism {said[12:32]!r}")


def try_store(host: str, port: int) -> Answer | None:
    """A question to torch's store, as a rank would put it."""
    from datetime import timedelta

    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    if not _is_store(host, port):
        return None
    try:
        store = TCPStore(host, port, timeout=timedelta(seconds=WAIT_S), wait_for_workers=False)
        return Answer("torch store", "answers", f"{store.num_keys()} keys")
    except (DistError, RuntimeError):
        return None


def _is_store(host: str, port: int) -> bool:
    """Whether a server answers a store's ping; the client of torch itself waits for minutes."""
    validate = b"\x00" + (0x3C85F7CE).to_bytes(4, "little")
    ping = b"\x0d" + (7).to_bytes(4, "little")
    return _exchange(host, port, validate + ping) == (7).to_bytes(4, "little")


def try_link(host: str, port: int) -> Answer | None:
    """A gateway's greeting with a token that nobody made."""
    from arriero.router.link.messages import TokenGreeting
    from arriero.shards.protocol import wire

    body = wire.encode(TokenGreeting(token="x" * 32))
    said = _exchange(host, port, len(body).to_bytes(4, "little") + body)
    if b"wrong token" in said:
        return Answer("link", "refuses", "the token is wrong")
    return Answer("link", "answers", repr(said[:80])) if said else None


def _certificate(host: str, port: int) -> str | None:
    try:
        return ssl.get_server_certificate((host, port), timeout=WAIT_S)
    except (OSError, ValueError):
        return None


def _name_of(certificate: str) -> str:
    from cryptography import x509

    names = x509.load_pem_x509_certificate(certificate.encode()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return str(next(iter(names.value)).value)


def _exchange(host: str, port: int, data: bytes, *, tls: bool = False) -> bytes:
    """What a server says to some bytes within `WAIT_S`, at most 64 KiB."""
    said = b""
    try:
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(socket.create_connection((host, port), WAIT_S))
            connection = plain
            if tls:
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                secure = context.wrap_socket(plain, server_hostname=host)
                connection = stack.enter_context(secure)
            connection.settimeout(WAIT_S)
            connection.sendall(data)
            while len(said) < 65_536 and (part := connection.recv(4096)):
                said += part
    except OSError:  # the end of the wait, or a connection that the server closed
        pass
    return said
