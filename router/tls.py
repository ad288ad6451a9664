"""TLS: certificates and keys from files, for listeners and for links.

Knows files and what grpcio and `ssl` want of them; knows nothing of who connects.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from arriero.shards.errors import SpecError

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
        """A gRPC listener's credentials.

        Raises:
            SpecError: a file is missing or wrong.
        """
        self.check(field)
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_credentials(
            [pair],
            root_certificates=None if self.ca is None else self.ca.read_bytes(),
            require_client_auth=self.ca is not None,
        )

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
