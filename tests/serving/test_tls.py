"""TLS and mTLS of the gRPC server."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from services.core.settings import Settings
from tests.serving.probe import failure, running


@dataclass
class Pair:
    """A certificate and its key, PEM."""

    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    @property
    def cert(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key(self) -> bytes:
        return self.private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def issue(name: str, issuer: Pair | None = None) -> Pair:
    """A CA without ``issuer``, else a certificate of it for 127.0.0.1."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
    )
    return Pair(builder.sign(issuer.private if issuer else private, hashes.SHA256()), private)


@pytest.fixture(scope="module")
def ca() -> Pair:
    return issue("ca")


@pytest.fixture
def tls(ca: Pair, tmp_path: Path) -> dict[str, Any]:
    server = issue("server", ca)
    files = {"tls_cert": server.cert, "tls_key": server.key, "tls_client_ca": ca.cert}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in files}


async def call(address: str, credentials: grpc.ChannelCredentials) -> Any:
    async with grpc.aio.secure_channel(address, credentials) as channel:
        return await channel.unary_unary("/probe.Probe/Unary")(b"", timeout=10)


async def test_tls(ca: Pair, tls: dict[str, Any]) -> None:
    del tls["tls_client_ca"]
    async with running(**tls) as house:
        assert await call(house.server.address, grpc.ssl_channel_credentials(ca.cert)) == b""
        assert (await failure(house.unary())).code() is grpc.StatusCode.UNAVAILABLE


async def test_mtls_takes_callers_of_its_ca_only(ca: Pair, tls: dict[str, Any]) -> None:
    stranger, friend = issue("friend", issue("other ca")), issue("friend", ca)
    async with running(**tls) as house:
        address = house.server.address
        known = grpc.ssl_channel_credentials(ca.cert, friend.key, friend.cert)
        assert await call(address, known) == b""
        for credentials in (
            grpc.ssl_channel_credentials(ca.cert),
            grpc.ssl_channel_credentials(ca.cert, stranger.key, stranger.cert),
        ):
            refused = await failure(call(address, credentials))
            assert refused.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("missing", ["tls_cert", "tls_key"])
def test_half_a_tls_setting_is_refused(missing: str) -> None:
    files = {"tls_cert": Path("c"), "tls_key": Path("k"), "tls_client_ca": Path("a")}
    del files[missing]
    with pytest.raises(ValueError, match="SF_TLS"):
        Settings(**files)
