"""The HTTP listener: uvicorn on the gateway's own event loop.

Knows sockets and start and stop; knows nothing of paths.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from arriero.router.tls import TlsFiles
from arriero.shards.errors import SpecError

log = logging.getLogger(__name__)

_START_LIMIT_S = 30.0
_RENEW_S = 1.0


class _UnchunkedCycle(RequestResponseCycle):
    """An answer for HTTP/1.0, which has no chunks: the end of the connection ends the answer."""

    async def send(self, message: ASGISendEvent) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            if b"content-length" not in names:
                self.chunked_encoding = False
        elif message["type"] == "http.response.body" and not self._sized:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)

    @property
    def _sized(self) -> bool:
        return bool(self.expected_content_length)


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which would answer HTTP/1.0 in chunks, with a fix."""

    def on_headers_complete(self) -> None:
        """Called after the headers of a request."""
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0" and self.cycle is not None:
            self.cycle.__class__ = _UnchunkedCycle


class _Server(uvicorn.Server):
    """A server without signal handlers; the process handles its signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture no signals."""
        yield


class HttpServer:
    """An HTTP listener: `bind`, `start`, `stop`.

    Args:
        app: the application.
        address: host and port; port 0 picks a free port.
        max_calls: most requests at once; further requests are refused with 503.
        tls: certificate and key, already checked; with a `ca`, clients must show a certificate.
            Renewed files take effect within a second.

    Attributes:
        port: the port, after `bind`.
    """

    def __init__(
        self, app: ASGIApp, address: str, *, max_calls: int, tls: TlsFiles | None = None
    ) -> None:
        self._address, self._tls = address, tls
        config = uvicorn.Config(
            app,
            http=_Protocol,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=max_calls,
            timeout_keep_alive=75,
            ws="none",
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else str(tls.key),
            ssl_ca_certs=None if tls is None or tls.ca is None else str(tls.ca),
            ssl_cert_reqs=ssl.CERT_NONE if tls is None or tls.ca is None else ssl.CERT_REQUIRED,
        )
        self._server = _Server(config)
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self.port = 0

    def bind(self) -> None:
        """Bind the port.

        Raises:
            OSError: the address cannot be bound.
        """
        host, _, port = self._address.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # asyncio turns Nagle's algorithm off only for a socket with the protocol IPPROTO_TCP.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, int(port)))
        except OSError as error:
            listener.close()
            raise OSError(f"cannot listen on {self._address}: {error}") from error
        self._socket = listener
        self.port = listener.getsockname()[1]

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the server did not start.
        """
        assert self._socket is not None, "start before bind"
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                while not self._server.started:
                    if self._task.done():
                        raise OSError(f"the HTTP server at {self._address} did not start")
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise OSError(
                f"the HTTP server at {self._address} did not start in {_START_LIMIT_S:g} s"
            ) from None
        if self._tls is not None:
            self._renewing = asyncio.create_task(self._renew(self._tls))

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running requests finish for `grace_s` seconds, then close."""
        if self._renewing is not None:
            self._renewing.cancel()
        if self._task is not None:
            self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
            self._server.should_exit = True
            await self._task
        if self._socket is not None:
            self._socket.close()

    async def _renew(self, tls: TlsFiles) -> None:
        """Load changed certificate files for later handshakes."""
        context, stamps_in_use = self._server.config.ssl, tls.stamps("tls")
        assert context is not None, "a TLS listener has a TLS context"
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                stamps = tls.stamps("tls")
                if stamps == stamps_in_use:
                    continue
                stamps_in_use = stamps
                tls.check("tls")
                context.load_cert_chain(tls.certificate, tls.key)
            except (SpecError, OSError) as error:
                log.error("the old certificates stay in use: %s", error)
