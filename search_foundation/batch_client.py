"""The REST paths of batch jobs, as a command line calls them."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import httpx

from services.core.settings import Settings, load_settings

KEY_VARIABLE = "API_KEY"
URL_HELP = "the gateway, with or without /v1; SF_PUBLIC_URL by default, or this machine's SF_HTTP_PORT"
_TIMEOUT = httpx.Timeout(120.0, connect=10.0)
_POLL_SECONDS = 2.0
_MAX_POLL_SECONDS = 10.0

Status = dict[str, Any]
"""The REST object ``BatchStatus``."""


class CallError(Exception):
    """A call did not succeed; the message is a sentence for the user.

    ``temporary`` says whether the same call may succeed later.
    """

    def __init__(self, message: str, *, temporary: bool) -> None:
        super().__init__(message)
        self.temporary = temporary


def gateway_url(given: str | None) -> str:
    """The gateway without ``/v1``: what was given, else where the settings say that callers reach it."""
    return (given or _by_settings(load_settings())).rstrip("/").removesuffix("/v1").rstrip("/")


def _by_settings(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    bracketed = f"[{host}]" if ":" in host else host
    return settings.public_url or f"http://{bracketed}:{settings.http_port}"


class BatchClient:
    """Calls one server with the key of API_KEY, or without a key if that is unset; closes with ``with``."""

    def __init__(self, url: str) -> None:
        self.url = url
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=_TIMEOUT)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise CallError(f"Wrong --url or {KEY_VARIABLE}: {error}.", temporary=False) from error

    def __enter__(self) -> BatchClient:
        self._http.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self._http.__exit__(*reason)

    def create(self, body: bytes) -> Status:
        """Make a job of a JSON request."""
        return self._call(
            "POST", "/v1/batch/embeddings", content=body, headers={"Content-Type": "application/json"}
        )[0]

    def status(self, batch_id: str) -> tuple[Status, float]:
        """Tell of a job, and after how many seconds it is worth asking again."""
        status, headers = self._call("GET", _path(batch_id))
        asked = headers.get("retry-after", "")
        wait = float(asked) if asked.isdigit() else _POLL_SECONDS
        return status, min(wait, _MAX_POLL_SECONDS)

    def list(self, limit: int) -> list[Status]:
        """Tell of the newest jobs, newest first."""
        return self._call("GET", "/v1/batches", params={"limit": limit})[0]

    def cancel(self, batch_id: str) -> Status:
        """Cancel a job."""
        return self._call("DELETE", _path(batch_id))[0]

    @contextmanager
    def download(self, batch_id: str, file: str, offset: int) -> Generator[httpx.Response]:
        """Open the ``output`` or ``errors`` of a job, leaving out the first ``offset`` bytes."""
        params = {"offset": offset} if offset else {}
        with (
            self._told(),
            self._http.stream(
                "GET", f"{_path(batch_id)}/{file}", params=params, follow_redirects=True
            ) as answer,
        ):
            if not answer.is_success:
                answer.read()
            _check(answer)
            yield answer

    def _call(self, method: str, path: str, **how: Any) -> tuple[Any, Mapping[str, str]]:
        with self._told():
            answer = self._http.request(method, path, **how)
            _check(answer)
            try:
                return answer.json(), answer.headers
            except ValueError as error:
                raise CallError(
                    f"{self.url} does not answer as this API does: no JSON.", temporary=False
                ) from error

    @contextmanager
    def _told(self) -> Generator[None]:
        try:
            yield
        except httpx.UnsupportedProtocol as error:
            raise CallError(f"Wrong --url: {error}", temporary=False) from error
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            raise CallError(f"No answer from {self.url}: {why}.", temporary=True) from error


def _path(batch_id: str) -> str:
    return f"/v1/batch/{quote(batch_id, safe='')}"


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    try:
        told: Any = answer.json()
    except ValueError:
        told = None
    fields: dict[str, Any] = told if isinstance(told, dict) else {}
    detail = fields.get("detail") or f"the server answered with status {answer.status_code}."
    code = fields.get("code") or answer.status_code
    if answer.status_code == HTTPStatus.UNAUTHORIZED:
        detail = f"{detail} This command takes the key from the variable {KEY_VARIABLE}."
    request = f" (request {fields['request_id']})" if fields.get("request_id") else ""
    raise CallError(
        f"{code}: {detail}{request}", temporary=answer.status_code == 429 or answer.status_code >= 500
    )
