"""Pictures and PDFs through the real Envoy: what comes back, what is refused, what a fault costs."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests import clip_references as reference
from tests.clip_checkpoints import V1, write_model
from tests.e2e.conftest import Api
from tests.gateway.client import Answer, get
from tests.media.pictures import A4, BAD, Bad, noise, pdf, photograph, saved
from tests.stack import Stack
from tests.threaded_http import serving

CHINA, FLOWER = photograph(), photograph("flower.jpg")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("clip")
    write_model(folder / "models", V1)
    settings = {
        "SF_MODEL_DIR": str(folder / "models"),
        "SF_DTYPE": "float32",
        "SF_FETCH_ALLOW_NETWORKS": '["127.0.0.1/32"]',
        "SF_MEDIA_DECODERS": "1",
    }
    with Stack(folder, settings) as stack:
        stack.serve("embed", "classify", models=(V1,))
        stack.gateway()
        yield Api(stack, stack.create_key())


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def folder_of(api: Api) -> Path:
    return Path(api.stack.settings["SF_MODEL_DIR"]) / V1


def test_pictures_and_texts_in_one_request(clip: Api) -> None:
    answer = clip.embed([{"image": text(CHINA)}, "a dog", {"image": text(FLOWER)}], model=V1)
    assert answer.status == 200
    found = [item["embedding"] for item in answer.json["data"]]
    folder = folder_of(clip)
    wanted = [
        reference.image_vector(folder, CHINA),
        reference.text_vector(folder, "a dog"),
        reference.image_vector(folder, FLOWER),
    ]
    np.testing.assert_allclose(found, [unit(each) for each in wanted], atol=1e-5)
    assert answer.json["usage"]["image_tokens"] == 12_000


def test_the_openai_client_sends_pictures_in_its_extra_body(clip: Api) -> None:
    base = f"http://127.0.0.1:{clip.stack.http_port}/v1"
    with openai.OpenAI(base_url=base, api_key=clip.key) as client:
        extra = {"input": [{"image": text(CHINA)}, "a dog"]}
        answer = client.embeddings.create(model=V1, input="", extra_body=extra)
    assert len(answer.data) == 2
    wanted = unit(reference.image_vector(folder_of(clip), CHINA))
    np.testing.assert_allclose(answer.data[0].embedding, wanted, atol=1e-5)


def test_pages_of_a_pdf(clip: Api) -> None:
    answer = clip.embed({"pdf": text(pdf(A4, A4, A4))}, model=V1)
    assert [item["index"] for item in answer.json["data"]] == [0, 1, 2]


def test_pictures_under_labels(clip: Api) -> None:
    answer = clip.classify(model=V1, input={"image": text(CHINA)}, labels=["a dog", "hello world"])
    assert answer.status == 200
    assert len(answer.json["data"][0]["predictions"]) == 2


# An empty string is refused before it is taken for a file: see the sources below.
@pytest.mark.parametrize(
    "bad",
    [bad for name, bad in BAD.items() if name != "empty"],
    ids=[name for name in BAD if name != "empty"],
)
def test_bad_files(clip: Api, bad: Bad) -> None:
    item = {bad.field: text(bad.make())}
    answer = clip.embed(item if bad.field == "pdf" else ["hello", item], model=V1)
    assert answer.error() == (400, "INPUT_INVALID")
    assert bad.says in answer.json["detail"]
    assert ("input 0" if bad.field == "pdf" else "input 1") in answer.json["detail"]


@pytest.mark.parametrize(
    ("source", "status", "says"),
    [
        ("http://169.254.169.254/latest/meta-data", 400, "not public"),
        ("http://[::1]:80/", 400, "not public"),
        ("http://localhost:1/", 400, "'http://localhost:1/'"),
        ("file:///etc/passwd", 400, "only http:// and https://"),
        ("gs://bucket/a.png", 400, "only http:// and https://"),
        ("!!!", 400, "neither a URL nor base64"),
        ("A" * (12 << 20), 400, "larger than 8,388,608 bytes"),
        (None, 422, "valid string"),
        ("", 422, "input"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_sources(clip: Api, source: Any, status: int, says: str) -> None:
    answer = clip.embed([{"image": source}], model=V1)
    assert answer.status == status
    assert says in answer.json["detail"]


def test_a_url_that_does_not_deliver(clip: Api) -> None:
    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/away" else 404)
            self.send_header("Location", "http://127.0.0.2/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Site) as url:
        for path, says in (("/gone", "it answered with status 404"), ("/away", "not public")):
            answer = clip.embed([{"image": url + path}], model=V1)
            assert answer.error() == (400, "INPUT_INVALID")
            assert says in answer.json["detail"]


def decoders(api: Api) -> list[int]:
    """The decoding processes of the service."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if b"services.core.media.decoder" in command and parent == api.stack.services[0].command.process.pid:
            found.append(int(entry.name))
    return found


def test_a_killed_decoder_ends_one_input_and_other_callers_go_on(clip: Api) -> None:
    def kill_in_the_middle() -> Answer:
        """Give what a call is told whose decoder is killed, if not before its file came there."""
        assert clip.embed([{"image": text(CHINA)}], model=V1).status == 200
        (pid,) = decoders(clip)
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor() as pool:
            victim = pool.submit(clip.embed, [{"image": text(FLOWER)}], model=V1)
            for _ in range(5):
                assert clip.embed("hello world", model=V1).status == 200
            os.kill(pid, signal.SIGKILL)
            return victim.result()

    for _ in range(20):
        told = kill_in_the_middle()
        if told.status != 200:
            break
    assert told.error() == (400, "INPUT_INVALID")
    assert "the decoder broke down on it" in told.json["detail"]
    assert clip.embed([{"image": text(CHINA)}], model=V1).status == 200


def test_many_pictures_in_one_request(clip: Api) -> None:
    small = [{"image": text(saved(noise(16, 16, seed)))} for seed in range(40)]
    answer = clip.embed(small, model=V1)
    assert answer.status == 200
    assert len(answer.json["data"]) == 40
    assert clip.embed(small * 52, model=V1).error() == (422, "VALIDATION_ERROR")


def test_the_document_describes_pictures(clip: Api) -> None:
    document = get(clip.stack.http_port, "/openapi.json").json
    schemas = document["components"]["schemas"]
    assert {"ImageDoc", "PDFDoc", "ImageTrainingItem"} <= set(schemas)
