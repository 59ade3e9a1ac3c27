"""The rendered configuration: Envoy itself must accept it, whatever the topology."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from gateway import contract
from gateway.build import envoy_yaml
from gateway.process import find_envoy
from gateway.routes import BODY_FILTER
from gateway.scripts import quote
from gateway.topology import parse
from search_foundation.capabilities import implemented
from services.core.catalog import Catalog, CatalogError
from services.core.catalog.types import Capability
from tests.gateway.certificates import Certificates
from tests.gateway.conftest import OTHER_MODEL
from tests.stack import MODEL

POOL: dict[str, Any] = {
    "name": "a",
    "capabilities": ["embed"],
    "models": [MODEL],
    "addresses": ["127.0.0.1:1"],
}
OTHER = POOL | {"name": "b", "models": [OTHER_MODEL], "addresses": ["embed.example:50051", "unix:/run/x"]}


def rendered(**topology: Any) -> str:
    document = {"listener": {"port": 8080}, "pools": [POOL], **topology}
    return envoy_yaml(parse(document), Catalog.load())


def accepted(text: str, folder: Path) -> None:
    file = folder / "envoy.yaml"
    file.write_text(text)
    run = subprocess.run(
        [find_envoy(), "--mode", "validate", "--disable-hot-restart", "-l", "warning", "-c", file],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "deprecated" not in run.stderr.lower(), run.stderr[-2000:]


@pytest.mark.parametrize(
    "topology",
    [
        {},
        {"pools": [POOL, OTHER]},
        {"grpc_listener": {"port": 1}, "admin": {"port": 2}, "metrics": {"port": 3}},
        {"compression": True, "cors": {"origins": []}, "access_log": None, "trusted_proxies": 2},
        {"access_log": "/dev/null", "cors": {"origins": ["https://a.example", "http://b.example:8080"]}},
        {"access_log": "stderr", "timeouts": {"request": 0.001, "idle": 3600, "drain": 0}},
        {"listener": {"host": "::", "port": 8080}},
    ],
    ids=lambda topology: ",".join(topology) or "default",
)
def test_envoy_accepts_it(topology: dict[str, Any], tmp_path: Path) -> None:
    accepted(rendered(**topology), tmp_path)


def test_envoy_accepts_tls(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    server = certificates.make("gateway")
    tls = {"certificate": str(server.certificate), "private_key": str(server.key)}
    client = certificates.make("client")
    accepted(
        rendered(
            listener={"port": 1, "tls": tls | {"client_ca": str(certificates.ca)}},
            grpc_listener={"port": 2, "tls": tls},
            services_tls={
                "ca": str(certificates.ca),
                "certificate": str(client.certificate),
                "private_key": str(client.key),
            },
        ),
        tmp_path,
    )


def test_the_same_topology_renders_the_same_text() -> None:
    assert rendered(pools=[POOL, OTHER]) == rendered(pools=[POOL, OTHER])


def test_the_body_is_read_for_its_model_only_where_that_matters() -> None:
    def disabled(**topology: Any) -> bool:
        (listener,) = yaml.safe_load(rendered(**topology))["static_resources"]["listeners"]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        assert BODY_FILTER in [one["name"] for one in manager["http_filters"]]
        (host,) = manager["route_config"]["virtual_hosts"]
        per_route = host.get("typed_per_filter_config", {}).get(BODY_FILTER, {})
        return per_route.get("disabled", False)

    assert disabled()
    assert disabled(pools=[POOL | {"models": [MODEL, OTHER_MODEL]}])
    assert not disabled(pools=[POOL, OTHER])


def test_admin_is_not_served_unless_asked_for() -> None:
    assert "admin" not in yaml.safe_load(rendered())


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(CatalogError, match="Unknown model 'nope'"):
        rendered(pools=[POOL | {"models": ["nope"]}])


def test_a_capability_without_a_service_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.build.has_services", lambda capability: capability is not Capability.CHAT)
    with pytest.raises(CatalogError, match=r"Pool a: this version has no service for the capability chat\."):
        rendered(pools=[POOL | {"capabilities": ["embed", "chat"]}])


def test_rest_calls_come_from_the_annotations() -> None:
    call, again, second, *_ = contract.rest_calls(Capability.EMBED)
    assert (again.path, again.rpc) == ("/openai/v1/embeddings", call.rpc)
    assert (call.method, call.path) == ("POST", "/v1/embeddings")
    assert (second.method, second.path, second.rpc) == ("POST", "/embeddings", call.rpc)
    assert (call.service, call.rpc) == ("searchfoundation.v1.EmbedRestService", "CreateEmbeddings")
    assert contract.typed_services(Capability.EMBED) == ("searchfoundation.v1.EmbedService",)
    assert contract.has_services(Capability.EMBED)


@pytest.mark.parametrize("capability", implemented())
def test_services_for_rest_callers_are_known_by_their_names(capability: Capability) -> None:
    assert all(name.endswith("RestService") for name in contract.rest_services(capability))
    assert not any(name.endswith("RestService") for name in contract.typed_services(capability))


def test_the_descriptor_set_is_whole_and_in_order() -> None:
    files = FileDescriptorSet.FromString(contract.descriptor_set((Capability.EMBED,)))
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    method = pool.FindMethodByName("searchfoundation.v1.EmbedRestService.CreateEmbeddings")
    assert method.input_type.full_name == "google.api.HttpBody"


def test_lua_strings() -> None:
    assert quote('a"b\n') == '"a\\"b\\n"'
    with pytest.raises(ValueError, match="ASCII"):
        quote("é")
