"""The server's certificate: read from its files, and read again when they change."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from prometheus_client import Gauge

logger = logging.getLogger(__name__)

_Stamps: TypeAlias = "list[tuple[int, int, int] | None]"

EXPIRY = Gauge(
    "searchfoundation_certificate_expiry_timestamp_seconds",
    "Unix time when the certificate shown to callers runs out; 0 without TLS.",
)


class CertificateError(OSError):
    """The files hold no certificate with its key; the text is a sentence for the operator."""


@dataclass(frozen=True)
class _Loaded:
    configuration: grpc.ServerCertificateConfiguration
    expiry: float


class Certificates:
    """A certificate chain and its key, and whom callers' certificates must come from, as PEM files.

    gRPC asks at every handshake, on threads of its own, and connections keep what they began with. What
    cannot be used, as a new certificate whose key is not there yet, is logged and the last good one goes on.
    """

    def __init__(self, chain: Path, key: Path, client_ca: Path | None = None) -> None:
        self._chain = chain
        self._key = key
        self._client_ca = client_ca
        self._lock = threading.Lock()
        self._refused: _Stamps = []
        self._shown = self._seen = self._stamps()
        self._loaded = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server that take up every change. Makes the gauge of the expiry tell of them."""
        EXPIRY.set_function(self._expiry)
        # None says that nothing changed, which the stubs do not know.
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._changed)
        mutual = self._client_ca is not None
        return grpc.dynamic_ssl_server_credentials(self._loaded.configuration, fetch, mutual)

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC is to use from now on, None for what it has."""
        with self._lock:
            self._look()
            if self._shown == self._seen:
                return None
            self._shown = self._seen
            logger.info("took up the certificate of %s", self._chain)
            return self._loaded.configuration

    def _expiry(self) -> float:
        """When the certificate of the next handshake runs out; connections may be kept for days."""
        with self._lock:
            self._look()
            return self._loaded.expiry

    def _look(self) -> None:
        """Read the files if they are not those seen last."""
        stamps = self._stamps()
        if stamps in (self._seen, self._refused):
            return
        try:
            loaded = self._load()
        except OSError as error:
            logger.warning("the certificate stays as it is: %s", error)
            self._refused = stamps
            return
        # Files that change right now are left for the next look.
        if self._stamps() == stamps:
            self._loaded, self._seen = loaded, stamps

    def _stamps(self) -> _Stamps:
        """Which files there are now; a Secret's are links that are swapped, so their inodes differ."""
        found: _Stamps = []
        for path in (self._chain, self._key, self._client_ca):
            try:
                stat = path.stat() if path is not None else None
            except OSError:
                stat = None
            found.append(stat and (stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return found

    def _load(self) -> _Loaded:
        chain, key = self._chain.read_bytes(), self._key.read_bytes()
        try:
            certificates = x509.load_pem_x509_certificates(chain)
            private = load_pem_private_key(key, None)
        except (ValueError, TypeError) as error:
            raise CertificateError(
                f"{self._chain} and {self._key} are not a PEM certificate and key."
            ) from error
        if certificates[0].public_key() != private.public_key():
            raise CertificateError(f"{self._key} is not the key of the certificate in {self._chain}.")
        authority = None if self._client_ca is None else self._client_ca.read_bytes()
        return _Loaded(
            grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=authority),
            min(certificate.not_valid_after_utc for certificate in certificates).timestamp(),
        )
