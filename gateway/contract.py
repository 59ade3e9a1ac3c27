"""What the protos say about routes: which services a capability has and which REST calls map to them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from services.core.catalog.types import Capability

_PACKAGE = "searchfoundation.v1"


@dataclass(frozen=True, slots=True)
class RestCall:
    """One REST operation: HTTP method, path template and the gRPC method that answers it.

    The answer of a streaming one comes in pieces for as long as it takes.
    """

    method: str
    path: str
    service: str
    rpc: str
    streaming: bool = False


def has_services(capability: Capability) -> bool:
    """Whether the protos define services for a capability."""
    return importlib.util.find_spec(f"{_PACKAGE}.{capability}_rest_pb2") is not None


def typed_services(capability: Capability) -> tuple[str, ...]:
    """Full names of the services for gRPC callers."""
    return tuple(service.full_name for service in _services(_file(f"{capability}_pb2")))


def rest_services(capability: Capability) -> tuple[str, ...]:
    """Full names of the services behind the REST paths."""
    return tuple(service.full_name for service in _services(_file(f"{capability}_rest_pb2")))


@functools.cache
def rest_calls(capability: Capability) -> tuple[RestCall, ...]:
    """The REST operations of a capability, from its ``google.api.http`` annotations, and HEAD beside GET."""
    return tuple(
        RestCall(method, path, service.full_name, rpc.name, rpc.server_streaming)
        for service in _services(_file(f"{capability}_rest_pb2"))
        for rpc in service.methods
        for rule, path in _rules(_http_rule(rpc))
        for method in (("GET", "HEAD") if rule == "GET" else (rule,))
    )


def descriptor_set(capabilities: tuple[Capability, ...]) -> bytes:
    """Serialised FileDescriptorSet of the REST services and everything they import, for the transcoder."""
    files: dict[str, FileDescriptor] = {}
    for capability in capabilities:
        _collect(_file(f"{capability}_rest_pb2"), files)
    result = FileDescriptorSet()
    for file in files.values():
        copy = result.file.add()
        file.CopyToProto(copy)
        _answer_head(copy)
    return result.SerializeToString(deterministic=True)


def _file(module: str) -> FileDescriptor:
    return importlib.import_module(f"{_PACKAGE}.{module}").DESCRIPTOR


def _answer_head(file: FileDescriptorProto) -> None:
    extension: Any = annotations_pb2.http
    for service in file.service:
        for rpc in service.method:
            rule: http_pb2.HttpRule = rpc.options.Extensions[extension]
            for method, path in list(_rules(rule)):
                if method == "GET":
                    rule.additional_bindings.add().custom.MergeFrom(
                        http_pb2.CustomHttpPattern(kind="HEAD", path=path)
                    )


def _services(file: FileDescriptor) -> Iterable[ServiceDescriptor]:
    return file.services_by_name.values()


def _http_rule(rpc: MethodDescriptor) -> http_pb2.HttpRule:
    extension: Any = annotations_pb2.http  # typed as a plain field descriptor
    return rpc.GetOptions().Extensions[extension]


def _collect(file: FileDescriptor, into: dict[str, FileDescriptor]) -> None:
    for dependency in file.dependencies:
        _collect(dependency, into)
    into.setdefault(file.name, file)


def _rules(rule: http_pb2.HttpRule) -> Iterator[tuple[str, str]]:
    for one in (rule, *rule.additional_bindings):
        kind = one.WhichOneof("pattern")
        if kind == "custom":
            yield one.custom.kind, one.custom.path
        elif kind:
            yield kind.upper(), getattr(one, kind)
