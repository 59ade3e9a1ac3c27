"""Endpoints of Kubernetes Services, told by its API as they change (EndpointSlices).

Unlike a DNS answer this has no bound on their number, and it says at once who is ready.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx

from gateway.topology import Address, Pool, Topology

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_SERVICE = "kubernetes.io/service-name"
_WATCH_SECONDS = 300
_RETRY_SECONDS = 1.0
_SETTLE_SECONDS = 0.1
"""Changes that come together are told together."""

Slice = Mapping[str, Any]


class EndpointSlices:
    """The ready endpoints of the Services that pools name, in one namespace."""

    def __init__(self, api: str, namespace: str, account: Path = ACCOUNT) -> None:
        self._api = api
        self._namespace = namespace
        self._account = account
        self._slices: dict[str, Slice] = {}
        self._changed = asyncio.Event()

    @classmethod
    def of_pod(cls, account: Path = ACCOUNT) -> Self:
        """Those of this pod's namespace, asked with its service account; raises OSError outside of a pod."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
        if not host or not port:
            raise OSError("pools of a Kubernetes Service need the pod's API server: this is no pod.")
        where = Address(host, int(port))
        return cls(f"https://{where}", (account / "namespace").read_text(encoding="utf-8").strip(), account)

    async def read(self) -> None:
        """Read them all, trying until the API server answers."""
        async with self._client() as client:
            await self._list(client)

    async def watch(self) -> AsyncIterator[None]:
        """Follow them for ever; yields after each change, or several together."""
        following = asyncio.create_task(self._follow())
        try:
            while True:
                await self._changed.wait()
                await asyncio.sleep(_SETTLE_SECONDS)
                self._changed.clear()
                yield
        finally:
            following.cancel()

    def resolve(self, topology: Topology) -> Topology:
        """The topology with the addresses that pools of a Service have now, which may be none."""
        return topology.model_copy(update={"pools": tuple(map(self._resolved, topology.pools))})

    def _resolved(self, pool: Pool) -> Pool:
        if pool.service is None:
            return pool
        addresses = sorted(self._addresses(pool.service))
        return pool.model_copy(update={"addresses": tuple(addresses)})

    def _addresses(self, service: str) -> Iterable[str]:
        name, _, port = service.rpartition(":")
        for found in self._slices.values():
            if found["metadata"].get("labels", {}).get(_SERVICE) != name:
                continue
            for endpoint in found.get("endpoints") or ():
                if endpoint.get("conditions", {}).get("ready") is not False:
                    yield from (str(Address(address, int(port))) for address in endpoint["addresses"])

    async def _follow(self) -> None:
        async with self._client() as client:
            while True:
                version = await self._list(client)
                self._changed.set()
                try:
                    await self._take_changes(client, version)
                except (httpx.HTTPError, ValueError) as error:
                    self._tell(error)
                    await asyncio.sleep(_RETRY_SECONDS)

    async def _list(self, client: httpx.AsyncClient) -> str:
        while True:
            try:
                answer = await client.get(self._path, headers=self._headers())
                answer.raise_for_status()
                document: dict[str, Any] = answer.json()
            except (httpx.HTTPError, ValueError, OSError) as error:
                self._tell(error)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._slices = {item["metadata"]["name"]: item for item in document["items"]}
            return document["metadata"]["resourceVersion"]

    async def _take_changes(self, client: httpx.AsyncClient, version: str) -> None:
        """Apply changes until the server ends the watch, as it does after a while, or for an old version."""
        parameters: dict[str, str | int] = {
            "watch": 1,
            "resourceVersion": version,
            "timeoutSeconds": _WATCH_SECONDS,
        }
        request = client.stream("GET", self._path, params=parameters, headers=self._headers())
        async with request as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                event: dict[str, Any] = json.loads(line)
                if event["type"] == "ERROR":
                    return
                name = event["object"]["metadata"]["name"]
                if event["type"] == "DELETED":
                    self._slices.pop(name, None)
                else:
                    self._slices[name] = event["object"]
                self._changed.set()

    @property
    def _path(self) -> str:
        return f"{self._api}/apis/discovery.k8s.io/v1/namespaces/{self._namespace}/endpointslices"

    def _headers(self) -> dict[str, str]:
        # The kubelet renews the token.
        return {"Authorization": f"Bearer {(self._account / 'token').read_text(encoding='utf-8').strip()}"}

    def _client(self) -> httpx.AsyncClient:
        context = ssl.create_default_context()
        if self._api.startswith("https:"):
            context.load_verify_locations(self._account / "ca.crt")
        return httpx.AsyncClient(verify=context, timeout=httpx.Timeout(10, read=_WATCH_SECONDS + 30))

    @staticmethod
    def _tell(error: Exception) -> None:
        print(f"search-foundation: EndpointSlices cannot be read: {error}", file=sys.stderr, flush=True)
