"""TLS: certificates and keys from files, for listeners and for links.

Knows files and what grpcio and `ssl` want of them; knows nothing of who connects.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from arriero.shards.errors import SpecError

log = logging.getLogger(__name__)

LINK_NAME = "arriero-link"
"""The name that certificates of links are for, since leaders listen at addresses that change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """PEM files of one side.

    Attributes:
        certificate: its chain, its own certificate first.
        key: the private key.
        ca: certificates that sign the other side's. On a listener: clients must have one of
            those (mutual TLS); None asks clients for none.
    """

    certificate: Path
    key: Path
    ca: Path | None = None

    def check(self, field: str) -> None:
        """Raise `SpecError` unless the files are there and fit together.

        Args:
            field: the spec's name for them.
        """
        self._context(field, ssl.PROTOCOL_TLS_SERVER)

    def server(self, field: str) -> grpc.ServerCredentials:
        """A gRPC listener's credentials, which follow the files: renewed ones need no restart.

        Files that are wrong later on leave those from before in use, with an error in the log.

        Raises:
            SpecError: a file is missing or wrong.
        """
        seen = self.stamps(field)
        first = self._configuration(field)

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """Called at each handshake: what is new, or None."""
            nonlocal seen
            try:
                stamps = self.stamps(field)
                if stamps == seen:
                    return None
                seen = stamps
                return self._configuration(field)
            except SpecError as error:
                log.error("the certificates stay as they were: %s", error)
                return None

        return grpc.dynamic_ssl_server_credentials(
            first,
            renewed,  # type: ignore[arg-type]  # grpcio takes None for "as before"
            self.ca is not None,
        )

    def stamps(self, field: str) -> list[tuple[int, int, int]]:
        """Changes when a file does.

        Raises:
            SpecError: one is gone.
        """
        found = []
        for path in filter(None, (self.certificate, self.key, self.ca)):
            try:
                status = path.stat()
            except OSError as error:
                raise SpecError(f"`{field}`: {path}: {error.strerror}") from None
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return found

    def link_server(self, field: str) -> ssl.SSLContext:
        """A leader's end of a link.

        Raises:
            SpecError: a file is missing or wrong.
        """
        context = self._context(field, ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_NONE if self.ca is None else ssl.CERT_REQUIRED
        return context

    def link_client(self, field: str) -> ssl.SSLContext:
        """A gateway's end of a link, which shows a certificate too.

        Raises:
            SpecError: a file is missing or wrong.
        """
        return self._context(field, ssl.PROTOCOL_TLS_CLIENT)

    def _configuration(self, field: str) -> grpc.ServerCertificateConfiguration:
        self.check(field)
        return grpc.ssl_server_certificate_configuration(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            root_certificates=None if self.ca is None else self.ca.read_bytes(),
        )

    def _context(self, field: str, side: int) -> ssl.SSLContext:
        context = ssl.SSLContext(side)
        try:
            context.load_cert_chain(self.certificate, self.key, password="")  # never ask for one
        except ssl.SSLError as error:
            raise SpecError(
                f"`{field}`: {self.certificate} and {self.key} are not a certificate and its key "
                f"in PEM: {error.reason or error}"
            ) from None
        except OSError as error:
            raise SpecError(
                f"`{field}`: {self.certificate} or {self.key}: {error.strerror}"
            ) from None
        if self.ca is not None:
            try:
                context.load_verify_locations(self.ca)
            except ssl.SSLError as error:
                raise SpecError(
                    f"`{field}.ca`: {self.ca} holds no certificate in PEM: {error.reason or error}"
                ) from None
            except OSError as error:
                raise SpecError(f"`{field}.ca`: {self.ca}: {error.strerror}") from None
        return context
