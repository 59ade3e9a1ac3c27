"""What the Hugging Face hub holds of a model: commit, licence, and the files a pull takes.

One documented API call, made with our own HTTP client; from ``huggingface_hub`` come the address
(``HF_ENDPOINT``), the caller's token and the offline switch, so that they work as everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Any, cast
from urllib.parse import quote

import httpx
from huggingface_hub import constants, get_token

from services.core.catalog.types import ModelSpec

_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".metadata"})
_OTHER_RUNTIMES = frozenset({"onnx", "openvino", "coreml", "mlx", "gguf", "tf", "flax"})
_TIMEOUT = httpx.Timeout(30.0)


class PullError(Exception):
    """Weights could not be fetched; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository: ``digest`` is a sha256, or for small files git's blob id (sha1), in hex."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of one commit that a pull takes, and the licence that the model card states."""

    repository: str
    commit: str
    licence: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def url(self, file: RemoteFile) -> str:
        """Address of ``file`` in this commit."""
        return f"{constants.ENDPOINT}/{self.repository}/resolve/{self.commit}/{quote(file.name)}"


def client() -> httpx.Client:
    """An HTTP client for the hub; raises ``PullError`` in offline mode."""
    if constants.is_offline_mode():
        raise PullError(
            "HF_HUB_OFFLINE is set, so nothing can be fetched; unset it or copy the files by hand."
        )
    headers = {"User-Agent": "search-foundation"}
    if token := get_token():
        headers["Authorization"] = f"Bearer {token}"
    return httpx.Client(follow_redirects=True, timeout=_TIMEOUT, headers=headers)


def describe(spec: ModelSpec, http: httpx.Client) -> Snapshot:
    """Ask the hub what the revision of ``spec`` holds; raises ``PullError``."""
    if not spec.repository:
        raise PullError(
            f"No weights of {spec.id} are published; put a copy that you own into the model folder."
        )
    url = f"{constants.ENDPOINT}/api/models/{spec.repository}/revision/{spec.revision}"
    try:
        answer = http.get(url, params={"blobs": "true"})
    except httpx.TransportError as error:
        raise PullError(f"Cannot reach the hub at {constants.ENDPOINT}: {error}.") from error
    if answer.status_code != HTTPStatus.OK:
        raise PullError(refusal(answer.status_code, f"{spec.repository} at {spec.revision}"))
    try:
        snapshot = _snapshot(spec, answer.json())
    except (ValueError, TypeError, KeyError) as error:
        raise PullError(f"The hub's answer about {spec.repository} cannot be read: {error!r}.") from error
    if spec.pinned and snapshot.commit != spec.revision:
        raise PullError(
            f"The hub answered commit {snapshot.commit} when asked for {spec.revision} of {spec.repository}."
        )
    return snapshot


def refusal(status: int, what: str) -> str:
    """Say in a sentence why the hub answered ``status`` when asked for ``what``."""
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return (
            f"The hub refuses {what} (status {status}): it does not exist, or its terms must be accepted on "
            "its page and your token be in HF_TOKEN."
        )
    if status == HTTPStatus.NOT_FOUND:
        return f"The hub has no {what}."
    return f"The hub answered {status} when asked for {what}."


def wanted(name: str) -> bool:
    """Whether a pull takes ``name``: weights, tokeniser, configuration, licence; never code or a pickle."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or any(part.startswith(".") for part in path.parts):
        return False
    if path.parts[0].lower() in _OTHER_RUNTIMES:
        return False
    return path.suffix in _SUFFIXES or path.name == "README.md" or path.name.upper().startswith("LICENSE")


def _snapshot(spec: ModelSpec, answer: Mapping[str, Any]) -> Snapshot:
    siblings = cast("Iterable[Mapping[str, Any]]", answer["siblings"])
    files = tuple(_file(entry) for entry in siblings if wanted(str(entry["rfilename"])))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise PullError(f"{spec.repository} holds no safetensors files; other weight formats are not used.")
    card = cast("Mapping[str, Any]", answer.get("cardData") or {})
    return Snapshot(spec.repository, str(answer["sha"]), str(card.get("license") or ""), files)


def _file(entry: Mapping[str, Any]) -> RemoteFile:
    lfs = cast("Mapping[str, Any] | None", entry.get("lfs"))
    digest = lfs["sha256"] if lfs else entry["blobId"]
    return RemoteFile(str(entry["rfilename"]), int(entry["size"]), str(digest))
