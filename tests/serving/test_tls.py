"""TLS and mTLS of the gRPC server."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import tempfile
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

from services.core.serving.certificates import EXPIRY, CertificateError
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


async def test_a_new_certificate_is_shown_without_a_restart(
    ca: Pair, tls: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Certificate, key and the callers' authority change under load, and no call fails."""
    later, friend = issue("later ca"), issue("friend", ca)
    heir = issue("heir", later)
    both = ca.cert + later.cert
    old = grpc.ssl_channel_credentials(both, friend.key, friend.cert)
    new = grpc.ssl_channel_credentials(both, heir.key, heir.cert)
    async with running(**tls) as house:
        address = house.server.address
        done, calls = asyncio.Event(), asyncio.Semaphore(0)

        async def on_one_connection() -> None:
            async with grpc.aio.secure_channel(address, old) as channel:
                while not done.is_set():
                    assert await channel.unary_unary("/probe.Probe/Unary")(b"", timeout=100) == b""
                    calls.release()

        async def on_new_connections() -> None:
            tls["tls_client_ca"].write_bytes(both)
            while not done.is_set():
                assert await call(address, old) == b""
                calls.release()

        loops = [asyncio.create_task(loop()) for loop in (on_one_connection, on_new_connections)]
        first = await _serial(address, ca, friend)
        renewed = issue("server", later)
        tls["tls_cert"].write_bytes(renewed.cert)
        assert await _serial(address, ca, friend) == first, "its key is not there yet"
        assert any("is not the key of" in record.getMessage() for record in caplog.records)
        tls["tls_key"].write_bytes(renewed.key)
        assert await _serial(address, later, friend) == renewed.certificate.serial_number != first
        assert EXPIRY.collect()[0].samples[0].value == renewed.certificate.not_valid_after_utc.timestamp()
        while not calls.locked():
            await calls.acquire()
        for _ in range(4):
            await calls.acquire()
        done.set()
        await asyncio.gather(*loops)
        tls["tls_client_ca"].write_bytes(later.cert)
        assert await call(address, new) == b""
        with pytest.raises(grpc.aio.AioRpcError):
            await call(address, old)


async def _serial(address: str, issuer: Pair, caller: Pair) -> int:
    """Serial number of the certificate that a new connection sees."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cadata=issuer.cert.decode())
    context.set_alpn_protocols(["h2"])
    with tempfile.NamedTemporaryFile() as file:
        file.write(caller.cert + caller.key)
        file.flush()
        context.load_cert_chain(file.name)
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(shown).serial_number
    finally:
        writer.close()


async def test_files_that_hold_no_pair_are_told_at_the_start(ca: Pair, tls: dict[str, Any]) -> None:
    tls["tls_key"].write_bytes(issue("another", ca).key)
    with pytest.raises(CertificateError, match="is not the key of the certificate"):
        async with running(**tls):
            pass
