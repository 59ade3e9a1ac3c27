from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from gateway.local import local_topology
from gateway.topology import Address, load, parse
from services.core.catalog.types import Capability
from services.core.settings import ConfigurationError, Settings

SMALL: dict[str, Any] = {
    "listener": {"port": 8080},
    "pools": [{"name": "a", "capabilities": ["embed"], "models": ["m"], "addresses": ["127.0.0.1:50051"]}],
}


def pool(name: str, *models: str, capabilities: tuple[str, ...] = ("embed",)) -> dict[str, Any]:
    return {
        "name": name,
        "capabilities": list(capabilities),
        "models": list(models),
        "addresses": ["127.0.0.1:1"],
    }


def test_a_file_says_the_same_as_plain_data(tmp_path: Path) -> None:
    document = SMALL | {
        "grpc_listener": {"port": 1, "tls": {"certificate": "/c", "private_key": "/k", "client_ca": "/a"}},
        "services_tls": {"ca": "/ca"},
        "limits": {"max_body_bytes": 5},
        "cors": {"origins": []},
        "access_log": None,
    }
    topology = parse(document)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(document))
    assert load(tmp_path / "t.yaml") == topology


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:50051", Address("127.0.0.1", 50051)),
        ("embed.svc.local:1", Address("embed.svc.local", 1)),
        ("[::1]:50051", Address("::1", 50051)),
        ("unix:/run/s.sock", Address(path="/run/s.sock")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["", "host", "host:", ":50", "host:0", "host:65536", "host:x"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an address: write host:port"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pools": []}, "at least 1 item"),
        ({"pools": [pool("a", "m"), pool("a", "n")]}, "pool names must differ"),
        (
            {"pools": [pool("a", "m") | {"weight": 0}, pool("b", "m") | {"weight": 0}]},
            "pools 'a', 'b' have weight 0 and nobody takes m for embed",
        ),
        ({"pools": [pool("a", "m") | {"weight": -1}]}, "greater than or equal to 0"),
        ({"pools": [pool("a")]}, "at least 1 item"),
        ({"pools": [pool("A b", "m")]}, "should match pattern"),
        ({"pools": [pool("a", "m", capabilities=("sing",))]}, "Input should be 'embed'"),
        ({"listener": {"port": 70000}}, "less than or equal to 65535"),
        ({"unknown": 1}, "Extra inputs are not permitted"),
        ({"metrics": {"port": 1}}, "metrics needs admin"),
        ({"services_tls": {"ca": "/a", "certificate": "/c"}}, "go together"),
    ],
)
def test_what_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parse(SMALL | change)


def test_pools_that_name_one_model_share_it() -> None:
    pools = [
        pool("a", "m", "n"),
        pool("b", "o"),
        pool("c", "n") | {"weight": 5},
        pool("d", "n") | {"weight": 0},
    ]
    shares = parse(SMALL | {"pools": pools}).shares_of(Capability.EMBED)
    assert [(share.models, [p.name for p in share.pools]) for share in shares] == [
        (("m",), ["a"]),
        (("n",), ["a", "c", "d"]),
        (("o",), ["b"]),
    ]
    ways = [[p.name for p in way] for way in shares[1].ways()]
    assert ways == [["a", "c", "d"], ["c", "a", "d"]]


def test_pools_of_a_capability() -> None:
    topology = parse(
        SMALL
        | {
            "pools": [
                pool("a", "m", "n"),
                pool("b", "o"),
                pool("c", "m", "p", capabilities=("rerank", "classify")),
            ]
        }
    )
    assert [p.name for p in topology.pools_of(Capability.EMBED)] == ["a", "b"]
    assert [p.name for p in topology.pools_of(Capability.CHAT)] == []
    assert topology.capabilities == (Capability.EMBED, Capability.RERANK, Capability.CLASSIFY)
    assert topology.models == ("m", "n", "o", "p")


class TestLocal:
    def test_follows_the_settings(self) -> None:
        settings = Settings(host="0.0.0.0", http_port=81, grpc_port=5, max_body_bytes=7, models=("m",))
        settings = settings.model_copy(update={"max_text_body_bytes": 6})
        topology = local_topology(settings, [Capability.EMBED])
        assert (topology.listener.host, topology.listener.port) == ("0.0.0.0", 81)
        assert (topology.limits.max_body_bytes, topology.limits.max_text_body_bytes) == (7, 6)
        assert [(p.models, p.addresses) for p in topology.pools] == [(("m",), ("127.0.0.1:5",))]
        assert topology.admin is not None
        assert topology.admin.host == "127.0.0.1"

    def test_the_gateway_file_is_put_over_them(self, tmp_path: Path) -> None:
        file = tmp_path / "gateway.yaml"
        file.write_text("limits: {max_connections: 3}\ncors: {origins: ['https://a.example']}\n")
        topology = local_topology(Settings(gateway_file=file, max_body_bytes=7), [Capability.EMBED])
        assert (topology.limits.max_connections, topology.limits.max_body_bytes) == (3, 7)
        assert topology.cors.origins == ("https://a.example",)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("limits: {max_heap: 3}", "limits.max_heap: Extra inputs"),
            ("- a", "must hold a mapping"),
            ("a: [", "Cannot read"),
            (None, "Cannot read"),
        ],
    )
    def test_a_wrong_file_is_one_sentence(self, tmp_path: Path, text: str | None, message: str) -> None:
        file = tmp_path / "gateway.yaml"
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            local_topology(Settings(gateway_file=file), [Capability.EMBED])

    def test_services_with_tls_need_a_gateway_that_trusts_them(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="services_tls"):
            local_topology(Settings(tls_cert=tmp_path, tls_key=tmp_path), [Capability.EMBED])
