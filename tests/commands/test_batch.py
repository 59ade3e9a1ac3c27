"""``search-foundation batch`` against a scripted server."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search_foundation.cli import main
from tests.commands.scripted_batches import ID, ScriptedBatches, scripted_batches, status
from tests.terminal import Terminal

OUTPUT = b"".join(b'{"id": "batch_req_%06d", "custom_id": "c%d"}\n' % (n, n) for n in range(4000))


@pytest.fixture
def server() -> Iterator[ScriptedBatches]:
    with scripted_batches() as script:
        script.statuses = [status("completed", 10)]
        script.files = {"output": OUTPUT}
        yield script


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("API_KEY", raising=False)
    # Neither waits of retries nor of polls matter here, only that they are there.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    return tmp_path


def batch(server: ScriptedBatches, *words: str) -> int:
    return main(["batch", words[0], "--url", server.url, *words[1:]])


def lines(*texts: str) -> str:
    return "".join(
        json.dumps({"custom_id": f"c{n}", "body": {"input": t}}) + "\n" for n, t in enumerate(texts)
    )


def test_submit_sends_the_file_and_prints_the_id(
    server: ScriptedBatches, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "jina_abc")
    (place / "in.jsonl").write_text("\ufeff" + lines("a", "é") + "\n\n")
    options = ["--model", "m", "--task", "retrieval", "--dimensions", "64", "--raw"]
    assert batch(server, "submit", "in.jsonl", *options, "--webhook", "https://x.org/") == 0
    assert capsys.readouterr().out == f"{ID}\n"
    ((method, target, headers, body),) = server.calls
    assert (method, target, headers["authorization"]) == ("POST", "/v1/batch/embeddings", "Bearer jina_abc")
    assert body == {
        "model": "m",
        "input": [
            {"custom_id": "c0", "body": {"input": "a"}},
            {"custom_id": "c1", "body": {"input": "é"}},
        ],
        "task": "retrieval",
        "dimensions": 64,
        "normalized": False,
        "webhook_url": "https://x.org/",
    }


def test_submit_from_standard_input_and_by_url(
    server: ScriptedBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines("a").encode())))
    assert batch(server, "submit", "-", "--model", "m") == 0
    assert batch(server, "submit", "s3://bucket/in.jsonl", "--model", "m") == 0
    bodies = [body for _, _, _, body in server.calls]
    assert bodies[0] == {"model": "m", "input": [{"custom_id": "c0", "body": {"input": "a"}}]}
    assert bodies[1] == {"model": "m", "input_url": "s3://bucket/in.jsonl"}
    assert "authorization" not in server.calls[0][2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "Cannot read in.jsonl"),
        ("", "no lines"),
        ('{"a": 1}\n\n{oops\n', "line 3: not JSON"),
        ('["a"]\n', "line 1: not a JSON object"),
        ("{}\n" * 10_001, "more than 10,000 lines"),
    ],
)
def test_files_that_cannot_be_sent(
    server: ScriptedBatches,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    said: str,
) -> None:
    if content is not None:
        (place / "in.jsonl").write_text(content)
    assert batch(server, "submit", "in.jsonl", "--model", "m") == 2
    assert said in capsys.readouterr().err
    assert not server.calls


def test_a_refusal_is_told(server: ScriptedBatches, capsys: pytest.CaptureFixture[str]) -> None:
    server.refusal = (401, {"detail": "Invalid API key.", "code": "AUTH_INVALID_API_KEY", "request_id": "r1"})
    said = "AUTH_INVALID_API_KEY: Invalid API key. This command takes the key from the variable API_KEY."
    said += " (request r1)\n"
    for words in (
        ["submit", "s3://b/k", "--model", "m"],
        ["watch", ID],
        ["status", ID],
        ["list"],
        ["cancel", ID],
    ):
        assert batch(server, *words) == 1
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9", "No answer from http://127.0.0.1:9"),
        ("127.0.0.1", "Wrong --url"),
        ("http://127.0.0.1:port", "Wrong --url"),
    ],
)
def test_wrong_urls_are_told(url: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch", "status", ID, "--url", url]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_url_that_up_prints_is_taken(server: ScriptedBatches, ending: str) -> None:
    assert main(["batch", "list", "--url", server.url + ending]) == 0
    assert server.calls[-1][1] == "/v1/batches?limit=20"


def test_without_a_url_the_settings_name_it(
    server: ScriptedBatches, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SF_HTTP_PORT", server.url.rpartition(":")[2])
    assert main(["batch", "watch", ID]) == 0
    assert f"search-foundation batch download {ID}\n" in capsys.readouterr().err
    monkeypatch.setenv("SF_HTTP_PORT", "1")
    monkeypatch.setenv("SF_PUBLIC_URL", f"{server.url}/v1")
    assert main(["batch", "status", ID]) == 0
    monkeypatch.setenv("SF_HTTP_PROT", "1")
    assert main(["batch", "status", ID]) == 2
    assert "Did you mean SF_HTTP_PORT?" in capsys.readouterr().err


def test_watch_follows_to_the_end_over_silence_and_refusals(
    server: ScriptedBatches, capsys: pytest.CaptureFixture[str]
) -> None:
    server.statuses = [
        status("pending", total=0),
        None,
        503,
        status("processing", 5),
        status("processing", 5),
        status("completed", 9, 1),
    ]
    assert batch(server, "watch", ID) == 0
    said = capsys.readouterr().err
    assert f"{ID}: pending\n" in said
    assert said.count("Trying again.") == 1
    assert said.count("processing, 5 of 10 lines") == 1
    assert "completed, 10 of 10 lines, 1 failed" in said
    assert "9 of 10 lines embedded, 1 failed." in said
    assert f"search-foundation batch download {ID} --errors --url {server.url}" in said


@pytest.mark.parametrize(
    ("state", "said"), [("failed", "has failed"), ("cancelled", "is cancelled"), ("expired", "has expired")]
)
def test_watch_of_a_job_that_went_wrong(
    server: ScriptedBatches, capsys: pytest.CaptureFixture[str], state: str, said: str
) -> None:
    server.statuses = [status(state, 3, error="The disk is full.")]
    assert batch(server, "watch", ID, "-o", "out.jsonl") == 1
    assert f"The job {said}: The disk is full.\n" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_watch_of_a_job_without_one_good_line(
    server: ScriptedBatches, capsys: pytest.CaptureFixture[str]
) -> None:
    server.statuses = [status("failed", 0, 10, error="No line could be embedded.", error_file_url="http://x")]
    assert batch(server, "watch", ID) == 1
    said = capsys.readouterr().err
    assert "The job has failed: No line could be embedded.\n" in said
    assert f"search-foundation batch download {ID} --errors --url {server.url}" in said


def test_submit_to_the_output_in_one_command(server: ScriptedBatches, place: Path) -> None:
    (place / "in.jsonl").write_text(lines("a"))
    server.statuses = [status("processing", 1), status("completed", 10)]
    assert batch(server, "submit", "in.jsonl", "--model", "m", "-o", "out.jsonl") == 0
    assert (place / "out.jsonl").read_bytes() == OUTPUT
    assert sorted(path.name for path in place.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_status_list_and_cancel(server: ScriptedBatches, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch(server, "status", ID) == 0
    assert "status          completed\n" in capsys.readouterr().out
    assert batch(server, "status", ID, "--json") == 0
    assert json.loads(capsys.readouterr().out) == status("completed", 10)
    assert batch(server, "list", "--limit", "2") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["ID", "STATUS", "MODEL", "CREATED", "DONE", "FAILED"]
    assert table[1].split()[-2:] == ["4/10", "1"]
    assert server.calls[-1][1] == "/v1/batches?limit=2"
    assert batch(server, "cancel", ID) == 0
    assert server.calls[-1][:2] == ("DELETE", f"/v1/batch/{ID}")
    assert "cancelled" in capsys.readouterr().out


def test_a_download_that_breaks_goes_on(server: ScriptedBatches, place: Path) -> None:
    server.cuts = [100_000, 0, 50_000]
    assert batch(server, "download", ID) == 0
    assert (place / f"{ID}_output.jsonl").read_bytes() == OUTPUT
    assert server.offsets()[0] == 0
    assert all(offset > 90_000 for offset in server.offsets()[1:])


def test_a_download_goes_on_in_the_next_run(
    server: ScriptedBatches, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cuts = [100_000, *[0] * 5]
    assert batch(server, "download", ID, "-o", "out.jsonl") == 1
    assert f"batch download {ID} --output out.jsonl" in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == [f"out.jsonl.{ID}.output.part"]
    server.calls.clear()
    assert batch(server, "download", ID, "-o", "out.jsonl") == 0
    assert (place / "out.jsonl").read_bytes() == OUTPUT
    assert server.offsets() == [100_000 - 4096]
    assert [path.name for path in place.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("begun", [b"of something else\n" * 1000, b"x", OUTPUT + b"more than there is\n"])
def test_a_partial_file_of_something_else_is_not_continued(
    server: ScriptedBatches, place: Path, begun: bytes
) -> None:
    (place / f"out.jsonl.{ID}.output.part").write_bytes(begun)
    assert batch(server, "download", ID, "-o", "out.jsonl") == 0
    assert (place / "out.jsonl").read_bytes() == OUTPUT


def test_a_stream_to_standard_output_goes_on(
    server: ScriptedBatches, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    server.cuts = [100_000, 0, 50_000]
    assert batch(server, "download", ID, "-o", "-") == 0
    assert capsysbinary.readouterr().out == OUTPUT
    assert server.offsets() == [0, 100_000, 100_000, 150_000]


def test_a_server_without_offsets_is_asked_from_the_start(server: ScriptedBatches, place: Path) -> None:
    server.knows_offset = False
    server.cuts = [100_000]
    assert batch(server, "download", ID, "-o", "out.jsonl") == 0
    assert (place / "out.jsonl").read_bytes() == OUTPUT


def test_the_error_file_and_a_missing_one(
    server: ScriptedBatches, place: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert batch(server, "download", ID, "--errors") == 1
    assert b"RESOURCE_NOT_FOUND: Not found. (request req_1)" in capsysbinary.readouterr().err
    assert not list(place.iterdir())
    server.files["errors"] = b'{"custom_id": "c1"}\n'
    assert batch(server, "download", ID, "--errors") == 0
    assert (place / f"{ID}_errors.jsonl").read_bytes() == b'{"custom_id": "c1"}\n'
    assert batch(server, "download", ID, "--errors", "-o", "-") == 0
    assert capsysbinary.readouterr().out == b'{"custom_id": "c1"}\n'


def test_an_empty_output(server: ScriptedBatches, place: Path) -> None:
    server.files["output"] = b""
    assert batch(server, "download", ID, "-o", "out.jsonl") == 0
    assert (place / "out.jsonl").read_bytes() == b""


def test_a_place_that_cannot_be_written(server: ScriptedBatches, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch(server, "download", ID, "-o", "nowhere/out.jsonl") == 1
    assert "Cannot write nowhere/out.jsonl: No such file or directory." in capsys.readouterr().err


def start(server: ScriptedBatches, *words: str, **how: Any) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "search_foundation.cli",
        "batch",
        words[0],
        "--url",
        server.url,
        *words[1:],
    ]
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, **how)


def test_ctrl_c_tells_how_to_see_the_job_again(server: ScriptedBatches) -> None:
    server.statuses = [status("processing", 5)]
    with start(server, "watch", ID, stderr=subprocess.PIPE) as command:
        assert server.asked.wait(30)
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=30)
    assert command.returncode == 130
    assert f"The job goes on. To see it again:\n  search-foundation batch watch {ID} --url" in said.decode()
    assert b"Traceback" not in said
    server.statuses = [status("completed", 10)]
    assert batch(server, "watch", ID) == 0


def shown_on_a_terminal(server: ScriptedBatches, *words: str) -> bytes:
    root = str(Path(__file__).parents[2])
    command = [
        sys.executable,
        "-m",
        "search_foundation.cli",
        "batch",
        words[0],
        "--url",
        server.url,
        *words[1:],
    ]
    with Terminal(command, {**os.environ, "PYTHONPATH": root}) as terminal:
        assert terminal.process.wait(60) == 0
    return bytes(terminal.shown)


def test_the_bar_of_a_job_shows_rate_and_time_left(server: ScriptedBatches) -> None:
    server.statuses = [status("processing", done) for done in range(10)] + [status("completed", 10)]
    shown = shown_on_a_terminal(server, "watch", ID)
    assert b"lines/s" in shown
    assert b" left" in shown
    assert b"10/10" in shown


@pytest.mark.parametrize("length", [True, False])
def test_the_bar_of_a_download_shows_rate_and_time_left(server: ScriptedBatches, length: bool) -> None:
    server.tells_length = length
    server.pause = 0.5
    shown = shown_on_a_terminal(server, "download", ID)
    size = f"{len(OUTPUT) / 1000:.1f}"
    assert f"{size}/{size if length else '?'} kB".encode() in shown
    assert b"B/s" in shown
    assert (b" left" in shown) is length
