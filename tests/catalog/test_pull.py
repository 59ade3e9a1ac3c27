"""Fetching weights from a hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from services.core.catalog import Catalog
from services.core.catalog.hub import PullError, RemoteFile, Snapshot, client, describe, wanted
from services.core.catalog.pull import RECORD, pull, pulled_commit
from services.core.catalog.types import ModelSpec
from tests.catalog.conftest import tiny_files, write_files
from tests.catalog.fake_hub import COMMIT, FakeHub

REPOSITORY = "jinaai/jina-embeddings-v2-base-en"


@pytest.fixture(autouse=True)
def environment(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("services.core.catalog.pull._PAUSE", 0.0)
    hub.repositories[REPOSITORY] = tiny_files(values=100_000)


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with client() as http:
        yield http


@pytest.fixture
def spec() -> ModelSpec:
    return Catalog.load().require("jina-embeddings-v2-base-en")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "jina-embeddings-v2-base-en"


class Fetched:
    """Fetches once and keeps what the progress was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def __call__(self, file: RemoteFile, size: int) -> None:
        self.told.append((file.name, size))


def fetch(spec: ModelSpec, target: Path, http: httpx.Client, *, replace: bool = False) -> bool:
    return pull(describe(spec, http), target, http, Fetched(), replace=replace)


def only_weights(hub: FakeHub) -> None:
    files = hub.repositories[REPOSITORY]
    hub.repositories[REPOSITORY] = {"model.safetensors": files["model.safetensors"]}


def test_files_arrive_whole_with_a_record(
    hub: FakeHub, spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    assert fetch(spec, target, http)
    found = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    record = json.loads(found.pop(RECORD))
    assert found == hub.repositories[REPOSITORY]
    assert (record["repository"], record["commit"], record["licence"]) == (
        REPOSITORY,
        spec.revision,
        "apache-2.0",
    )
    assert [path.name for path in target.parent.glob(".*.partial")] == []


def test_the_pinned_revision_is_asked_for(hub: FakeHub, spec: ModelSpec, http: httpx.Client) -> None:
    describe(spec, http)
    assert hub.requests[0][0] == f"/api/models/{REPOSITORY}/revision/{spec.revision}"


def test_another_commit_than_the_pinned_one_is_refused(
    hub: FakeHub, spec: ModelSpec, http: httpx.Client
) -> None:
    hub.keeps_pins = False
    with pytest.raises(PullError, match=f"answered commit {COMMIT} when asked for {spec.revision}"):
        describe(spec, http)


def test_a_second_pull_fetches_nothing(
    hub: FakeHub, spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    fetch(spec, target, http)
    before = len(hub.requests)
    assert not fetch(spec, target, http)
    assert len(hub.requests) == before + 1


def test_a_cut_connection_is_taken_up_where_it_broke(
    hub: FakeHub, spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    only_weights(hub)
    hub.cuts = [100_000, 50_000]
    assert fetch(spec, target, http)
    ranges = hub.downloads("model.safetensors")
    assert ranges == ["bytes=0-", "bytes=100000-", "bytes=150000-"]


def test_what_an_earlier_run_left_is_kept(
    hub: FakeHub, spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    only_weights(hub)
    hub.cuts = [1000, 1000] + [0] * 5
    with pytest.raises(PullError, match=r"broke off at 2,000 bytes .* Run the command again to go on"):
        fetch(spec, target, http)
    assert not target.exists()
    assert fetch(spec, target, http)
    assert hub.downloads("model.safetensors") == ["bytes=0-", "bytes=1000-"] + ["bytes=2000-"] * 6
    assert (target / "model.safetensors").read_bytes() == hub.repositories[REPOSITORY]["model.safetensors"]


def test_a_passing_failure_is_tried_again(
    hub: FakeHub, spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    hub.statuses = [503, 429, 500]
    assert fetch(spec, target, http)


def test_a_file_that_is_gone_is_not_tried_again(
    hub: FakeHub, spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    hub.statuses = [404]
    with pytest.raises(PullError, match=r"The hub has no config\.json"):
        fetch(spec, target, http)
    assert len(hub.downloads("config.json")) == 1


def test_a_wrong_hash_is_refused_and_the_file_deleted(
    hub: FakeHub, spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    hub.wrong_hash = {"model.safetensors"}
    with pytest.raises(PullError, match=r"model\.safetensors .* is not what the hub says it holds"):
        fetch(spec, target, http)
    assert not target.exists()
    assert not list(target.parent.rglob("model.safetensors*"))


def test_a_part_that_does_not_fit_is_refused_and_then_fetched_anew(
    hub: FakeHub, spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    partial = target.with_name(f".{target.name}.{spec.revision[:12]}.partial")
    write_files(partial, {"model.safetensors.part": b"x" * 1000})
    with pytest.raises(PullError, match="size or hash differ"):
        fetch(spec, target, http)
    assert fetch(spec, target, http)


def test_a_small_file_is_checked_by_its_git_hash(spec: ModelSpec, target: Path, http: httpx.Client) -> None:
    snapshot = describe(spec, http)
    wrong = tuple(
        replace(file, digest="0" * 40) if file.name == "config.json" else file for file in snapshot.files
    )
    with pytest.raises(PullError, match=r"config\.json"):
        pull(replace(snapshot, files=wrong), target, http, Fetched(), replace=False)


def test_a_folder_that_no_pull_made_is_kept_unless_told(
    spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    write_files(target, {"mine.txt": b"mine"})
    with pytest.raises(PullError, match="was not made by a pull; --force replaces it"):
        fetch(spec, target, http)
    assert (target / "mine.txt").exists()
    assert fetch(spec, target, http, replace=True)
    assert not (target / "mine.txt").exists()
    assert pulled_commit(target) == spec.revision


def test_an_older_pull_is_replaced(spec: ModelSpec, target: Path, http: httpx.Client) -> None:
    write_files(target, {RECORD: b'{"commit": "older"}', "old.json": b"{}"})
    assert fetch(spec, target, http)
    assert not (target / "old.json").exists()


def test_progress_ends_at_the_full_size_of_every_file(
    spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    snapshot, progress = describe(spec, http), Fetched()
    pull(snapshot, target, http, progress, replace=False)
    last = dict(progress.told)
    assert last == {file.name: file.size for file in snapshot.files}


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("adapters/retrieval/adapter_model.safetensors", True),
        ("1_Pooling/config.json", True),
        ("vocab.txt", True),
        ("sentencepiece.bpe.model", True),
        ("artifact.metadata", True),
        ("chat_template.jinja", True),
        ("README.md", True),
        ("LICENSE", True),
        ("pytorch_model.bin", False),
        ("model.pt", False),
        ("modeling_bert.py", False),
        ("onnx/model.onnx", False),
        ("onnx/config.json", False),
        ("model.gguf", False),
        (".gitattributes", False),
        ("../config.json", False),
        ("/etc/passwd.json", False),
        ("a/../../b.json", False),
        ("assets/picture.png", False),
    ],
)
def test_only_data_is_taken(name: str, taken: bool) -> None:
    assert wanted(name) is taken


def test_a_repository_without_safetensors_is_refused(
    hub: FakeHub, spec: ModelSpec, http: httpx.Client
) -> None:
    hub.repositories[REPOSITORY] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(PullError, match="holds no safetensors"):
        describe(spec, http)


def test_a_repository_that_is_not_there_or_closed(hub: FakeHub, spec: ModelSpec, http: httpx.Client) -> None:
    hub.repositories.clear()
    with pytest.raises(PullError, match="does not exist, or its terms must be accepted"):
        describe(spec, http)


def test_a_model_without_repository_cannot_be_fetched(http: httpx.Client) -> None:
    with pytest.raises(PullError, match="No weights of elser-v2 are published"):
        describe(Catalog.load().require("elser-v2"), http)


def test_offline_nothing_is_tried(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PullError, match="HF_HUB_OFFLINE is set"):
        client()
    assert hub.requests == []


def test_an_answer_that_cannot_be_read(hub: FakeHub, spec: ModelSpec, http: httpx.Client) -> None:
    hub.repositories[REPOSITORY] = {}
    hub.describe = lambda *_: {"siblings": [{"rfilename": "a.safetensors"}]}  # type: ignore[method-assign]
    with pytest.raises(PullError, match="cannot be read"):
        describe(spec, http)


def test_no_room_on_the_disk_is_told_before_fetching(
    hub: FakeHub, spec: ModelSpec, target: Path, http: httpx.Client
) -> None:
    snapshot = describe(spec, http)
    huge = Snapshot(
        snapshot.repository, snapshot.commit, "", (RemoteFile("model.safetensors", 1 << 60, "0" * 64),)
    )
    with pytest.raises(PullError, match="bytes free, the files need"):
        pull(huge, target, http, Fetched(), replace=False)
    assert hub.downloads("model.safetensors") == []


def test_a_folder_that_cannot_be_written_is_told(spec: ModelSpec, tmp_path: Path, http: httpx.Client) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PullError, match="Cannot write to"):
        fetch(spec, tmp_path / "file" / "model", http)
