"""TLS: certificates and keys from files, for listeners and for links.

Knows files and the credentials of grpcio and `ssl`; knows nothing of the peers.
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
"""Host name in certificates of links; a fixed name, because leaders' addresses change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """PEM files of one side of a connection.

    Attributes:
        certificate: certificate chain, own certificate first.
        key: private key.
        ca: certificates that sign the other side's certificate. With a `ca`, a listener requires
            client certificates (mutual TLS); None for no client certificates.
    """

    certificate: Path
    key: Path
    ca: Path | None = None

    def check(self, field: str) -> None:
        """Raise `SpecError` unless the files exist and match.

        Args:
            field: name of the field in the spec, for errors.
        """
        self._context(field, ssl.PROTOCOL_TLS_SERVER)

    def server(self, field: str) -> grpc.ServerCredentials:
        """Credentials of a gRPC listener; renewed files take effect without a restart.

        If renewed files are wrong, the old certificates stay and the log gets an error.

        Raises:
            SpecError: a file is missing or wrong.
        """
        stamps_in_use = self.stamps(field)
        first = self._configuration(field)

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """Called at each handshake: the new configuration, or None for no change."""
            nonlocal stamps_in_use
            try:
                stamps = self.stamps(field)
                if stamps == stamps_in_use:
                    return None
                stamps_in_use = stamps
                return self._configuration(field)
            except SpecError as error:
                log.error("the old certificates stay in use: %s", error)
                return None

        return grpc.dynamic_ssl_server_credentials(
            first,
            renewed,  # type: ignore[arg-type]  # grpcio takes None for "as before"
            self.ca is not None,
        )

    def stamps(self, field: str) -> list[tuple[int, int, int]]:
        """Inode, modification time and size of each file; changes with the files.

        Raises:
            SpecError: a file is missing.
        """
        stamps = []
        for path in filter(None, (self.certificate, self.key, self.ca)):
            try:
                status = path.stat()
            except OSError as error:
                raise SpecError(f"`{field}`: {path}: {error.strerror}") from None
            stamps.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return stamps

    def link_server(self, field: str) -> ssl.SSLContext:
        """TLS settings of the leader's end of a link.

        Raises:
            SpecError: a file is missing or wrong.
        """
        context = self._context(field, ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_NONE if self.ca is None else ssl.CERT_REQUIRED
        return context

    def link_client(self, field: str) -> ssl.SSLContext:
        """TLS settings of the gateway's end of a link; the gateway shows a certificate too.

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
            context.load_cert_chain(
                self.certificate, self.key, password=""
            )  # never prompt for a password
        except ssl.SSLError as error:
            raise SpecError(
                f"`{field}`: {self.certificate} and {self.key} are no certificate with its key "
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
