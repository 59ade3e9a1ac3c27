from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.gateway.certificates import Certificates, Pair
from tests.gateway.client import get, post
from tests.gateway.conftest import StartGateway, pool
from tests.gateway.scripted import ScriptedService
from tests.servers import free_port


@pytest.fixture
def authority(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Certificates:
    """An authority that nobody here trusts."""
    return Certificates(tmp_path, "stranger")


def https(port: int, ca: Path, client: Pair | None = None) -> int:
    """Status of GET /health over TLS."""
    context = ssl.create_default_context(cafile=ca)
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=100, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    finally:
        connection.close()


def listener(port: int, pair: Pair, **fields: str) -> dict[str, object]:
    tls = {"certificate": str(pair.certificate), "private_key": str(pair.key), **fields}
    return {"port": port, "tls": tls}


def test_the_listener_speaks_tls(
    start_gateway: StartGateway, service: ScriptedService, authority: Certificates, stranger: Certificates
) -> None:
    port = free_port()
    start_gateway(pool(service), listener=listener(port, authority.make("gateway")), http_port=port)
    assert https(port, authority.ca) == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        https(port, stranger.ca)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        get(port, "/health")


def test_callers_may_be_asked_for_a_certificate(
    start_gateway: StartGateway, service: ScriptedService, authority: Certificates, stranger: Certificates
) -> None:
    port = free_port()
    mutual = listener(port, authority.make("gateway"), client_ca=str(authority.ca))
    start_gateway(pool(service), listener=mutual, http_port=port)
    assert https(port, authority.ca, authority.make("caller")) == 200
    for client in (None, stranger.make("other")):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            https(port, authority.ca, client)


@pytest.fixture
def guarded(authority: Certificates) -> Iterator[ScriptedService]:
    """A service that only takes callers with a certificate of the authority."""
    pair = authority.make("service")
    credentials = grpc.ssl_server_credentials(
        [(pair.key.read_bytes(), pair.certificate.read_bytes())],
        root_certificates=authority.ca.read_bytes(),
        require_client_auth=True,
    )
    scripted = ScriptedService("guarded", credentials=credentials)
    scripted.start()
    yield scripted
    scripted.stop()


def client_tls(authority: Certificates, pair: Pair) -> dict[str, str]:
    return {"ca": str(authority.ca), "certificate": str(pair.certificate), "private_key": str(pair.key)}


def test_mutual_tls_to_the_services(
    start_gateway: StartGateway, guarded: ScriptedService, authority: Certificates
) -> None:
    stack = start_gateway(pool(guarded), services_tls=client_tls(authority, authority.make("gateway")))
    assert post(stack.http_port, {}).status == 200
    assert get(stack.http_port, "/ready").status == 200


@pytest.mark.parametrize(
    "case", ["no certificate", "a stranger's", "wrong authority", "wrong name", "no tls"]
)
def test_without_trust_there_is_no_call(
    start_gateway: StartGateway,
    guarded: ScriptedService,
    authority: Certificates,
    stranger: Certificates,
    case: str,
) -> None:
    ours = authority.make("gateway")
    settings = {
        "no certificate": {"ca": str(authority.ca)},
        "a stranger's": client_tls(authority, stranger.make("other")),
        "wrong authority": client_tls(stranger, ours),
        "wrong name": {**client_tls(authority, ours), "server_name": "elsewhere.example"},
        "no tls": None,
    }[case]
    port = start_gateway(pool(guarded), services_tls=settings, ready=False).await_listening()
    assert post(port, {}).error() == (503, "SERVICE_UNAVAILABLE")
    assert get(port, "/ready").error() == (503, "SERVICE_UNAVAILABLE")
    assert not guarded.calls
