"""Every published field of every vendor's call, through Envoy.

Each changes the answer, or changes nothing because it asks for what is done anyway, or is refused with a
sentence that names it. Nothing is passed over.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from services.core.catalog import Catalog
from services.core.forms import FORMS
from tests import clip_checkpoints, text_checkpoints
from tests.checkpoints import minilm_directory
from tests.e2e.conftest import Api
from tests.gateway.client import Answer, get, post
from tests.media.pictures import noise, saved
from tests.stack import MODEL, Stack

V2, V3, COLBERT, ELSER = "jina-embeddings-v2-base-en", "jina-embeddings-v3", "jina-colbert-v2", "elser-v2"
RERANKER, CLIP = "jina-reranker-v2-base-multilingual", clip_checkpoints.V1
MODELS = (MODEL, V2, V3, COLBERT, ELSER, RERANKER, CLIP)
TEXTS = ["the quick brown fox", "hello dog"]
DOCUMENTS = [{"title": "hello world", "text": "a dog, a fox."}, {"title": "a fox", "text": "hello dog"}]
CHANGES, SAME = "changes the answer", "changes nothing"
VOLATILE = ("id", "total_duration")


@pytest.fixture(scope="module")
def vendors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("vendors")
    for model in (V2, V3, COLBERT, ELSER, RERANKER):
        text_checkpoints.write_model(folder / "models", model)
    clip_checkpoints.write_model(folder / "models", CLIP)
    settings = {
        "SF_MODEL_DIR": str(folder / "models"),
        "SF_DTYPE": "float32",
        # Every text has more tokens than that, whatever the minute.
        "SF_TIERS": '{"narrow": {"tokens_per_minute": 1}}',
    }
    with Stack(folder, settings) as stack:
        stack.serve("embed", "rerank", models=MODELS)
        stack.gateway()
        yield Api(stack, stack.create_key())


@dataclass(frozen=True)
class Shape:
    """A call that is answered, and what becomes of it with each value of each field."""

    path: str
    body: dict[str, Any]
    fields: tuple[tuple[str, Any, str], ...]

    def on(self, path: str) -> Shape:
        return replace(self, path=path)


REFUSED = "is refused"

COHERE_EMBED = Shape(
    "/v2/embed",
    {"model": V3, "texts": TEXTS, "input_type": "search_document"},
    (
        ("input_type", "search_query", CHANGES),
        ("input_type", "classification", CHANGES),
        ("input_type", "clustering", CHANGES),
        ("input_type", "image", REFUSED),
        ("input_type", "summary", REFUSED),
        ("embedding_types", ["int8", "ubinary"], CHANGES),
        ("embedding_types", ["int4"], REFUSED),
        ("output_dimension", 64, CHANGES),
        ("output_dimension", "64", CHANGES),
        ("output_dimension", 1024, SAME),
        ("output_dimension", 4096, REFUSED),
        ("truncate", "NONE", SAME),
        ("truncate", "START", REFUSED),
        ("max_tokens", 3, REFUSED),
        ("max_tokens", None, SAME),
        ("priority", 0, SAME),
        ("priority", 7, REFUSED),
        ("images", ["data:image/png;base64,AA"], "not 'image'"),
        ("texts", "not a list", REFUSED),
        ("inputs", [{"content": [{"type": "audio"}]}], REFUSED),
        ("nobody_knows", 1, SAME),
    ),
)
COHERE_OF_FIXED_WIDTH = Shape(
    "/v1/embed",
    {"model": V2, "texts": TEXTS},
    (
        ("output_dimension", 64, REFUSED),
        ("output_dimension", 768, SAME),
        ("input_type", "search_query", SAME),
    ),
)
COHERE_RERANK = Shape(
    "/v2/rerank",
    {"model": RERANKER, "query": "fox", "documents": TEXTS},
    (
        ("top_n", 1, CHANGES),
        ("top_n", 0, REFUSED),
        ("return_documents", True, CHANGES),
        ("return_documents", "maybe", REFUSED),
        ("max_tokens_per_doc", 3, REFUSED),
        ("priority", 1, REFUSED),
        ("nobody_knows", 1, SAME),
    ),
)
COHERE_RERANK_OF_CHOSEN_LENGTH = Shape(
    "/v2/rerank",
    {"model": MODEL, "query": "fox", "documents": TEXTS},
    (("max_tokens_per_doc", 3, CHANGES), ("max_tokens_per_doc", 0, REFUSED)),
)
COHERE_RERANK_V1 = Shape(
    "/v1/rerank",
    {"model": RERANKER, "query": "fox", "documents": DOCUMENTS, "rank_fields": ["text"]},
    (
        ("rank_fields", ["title"], CHANGES),
        ("rank_fields", ["title", "text"], CHANGES),
        ("rank_fields", ["author"], REFUSED),
        ("rank_fields", "title", REFUSED),
        ("max_chunks_per_doc", 1, SAME),
        ("max_chunks_per_doc", 10, REFUSED),
        ("return_documents", True, CHANGES),
        ("top_n", 1, CHANGES),
    ),
)
TEI_EMBED = Shape(
    "/embed",
    {"inputs": TEXTS, "model": V3},
    (
        ("normalize", False, CHANGES),
        ("normalize", True, SAME),
        ("truncate", True, SAME),
        ("truncate", False, SAME),
        ("truncation_direction", "right", SAME),
        ("truncation_direction", "Left", REFUSED),
        ("prompt_name", "query", CHANGES),
        ("prompt_name", "summary", REFUSED),
        ("dimensions", 64, CHANGES),
        ("dimensions", -1, REFUSED),
        ("model", MODEL, CHANGES),
        ("inputs", [101, 102], REFUSED),
    ),
)
TEI_OF_FIXED_WIDTH = Shape(
    "/embed",
    {"inputs": TEXTS, "model": V2},
    (("dimensions", 64, REFUSED), ("dimensions", 768, SAME), ("prompt_name", "query", REFUSED)),
)
TEI_SPARSE = Shape(
    "/embed_sparse",
    {"inputs": TEXTS},
    (
        ("truncate", True, SAME),
        ("truncate", False, REFUSED),
        ("truncation_direction", "left", REFUSED),
        ("prompt_name", "query", SAME),
        ("prompt_name", "summary", REFUSED),
        ("model", MODEL, "sparse vectors"),
    ),
)
TEI_ALL = Shape(
    "/embed_all",
    {"inputs": TEXTS, "model": COLBERT},
    (
        ("prompt_name", "query", CHANGES),
        ("prompt_name", "document", SAME),
        ("truncation_direction", "left", REFUSED),
        ("model", MODEL, CHANGES),
        ("model", CLIP, "vector for each token"),
    ),
)
TEI_SIMILARITY = Shape(
    "/similarity",
    {"inputs": {"source_sentence": "fox", "sentences": TEXTS}},
    (
        ("parameters", {"truncate": True}, SAME),
        ("parameters", {"truncation_direction": "left"}, "truncation_direction"),
        ("parameters", {"prompt_name": "query"}, "prompt_name"),
        ("inputs", {"source_sentence": "fox", "sentences": []}, "sentences"),
    ),
)
TEI_RERANK = Shape(
    "/rerank",
    {"query": "fox", "texts": TEXTS, "model": RERANKER},
    (
        ("raw_scores", False, SAME),
        ("raw_scores", True, REFUSED),
        ("return_text", True, CHANGES),
        ("truncate", True, SAME),
        ("truncation_direction", "left", REFUSED),
        ("model", MODEL, CHANGES),
    ),
)
GEMINI = Shape(
    f"/v1beta/models/{V3}:embedContent",
    {"content": {"parts": [{"text": TEXTS[0]}]}, "taskType": "RETRIEVAL_DOCUMENT"},
    (
        ("taskType", "TASK_TYPE_UNSPECIFIED", CHANGES),
        ("taskType", "RETRIEVAL_QUERY", CHANGES),
        ("taskType", "SEMANTIC_SIMILARITY", CHANGES),
        ("taskType", "CLASSIFICATION", CHANGES),
        ("taskType", "CLUSTERING", CHANGES),
        ("taskType", "QUESTION_ANSWERING", CHANGES),
        ("taskType", "FACT_VERIFICATION", CHANGES),
        ("taskType", "CODE_RETRIEVAL_QUERY", CHANGES),
        ("taskType", "SUMMARY", REFUSED),
        ("title", "hello", CHANGES),
        ("title", 7, REFUSED),
        ("outputDimensionality", 64, CHANGES),
        ("output_dimensionality", 64, CHANGES),
        ("outputDimensionality", 4096, REFUSED),
        ("model", f"models/{V3}", SAME),
        ("model", "models/other", REFUSED),
        ("embedContentConfig", {"autoTruncate": True}, SAME),
        ("embedContentConfig", {"autoTruncate": False}, REFUSED),
        ("content", {"parts": [{"text": TEXTS[0]}], "role": "user"}, SAME),
        ("content", {"parts": [{"fileData": {"fileUri": "gs://a"}}]}, "fileData"),
        ("content", {"parts": [{"inlineData": {"mimeType": "image/png", "data": "AA"}}]}, "image"),
        ("content", {"parts": []}, "parts"),
    ),
)
GEMINI_UNTITLED = Shape(
    f"/v1/models/{V3}:embedContent",
    {"content": {"parts": [{"text": TEXTS[0]}]}},
    (("title", "hello", REFUSED), ("task_type", "RETRIEVAL_QUERY", CHANGES)),
)
OLLAMA = Shape(
    "/api/embed",
    {"model": f"{V3}:latest", "input": TEXTS},
    (
        ("truncate", True, SAME),
        ("truncate", False, SAME),
        ("dimensions", 64, CHANGES),
        ("dimensions", 4096, REFUSED),
        ("options", {"num_ctx": 8192, "temperature": 0}, SAME),
        ("options", {"num_ctx": 16}, "num_ctx"),
        ("keep_alive", "5m", SAME),
        ("keep_alive", -1, SAME),
        ("keep_alive", [], REFUSED),
        ("input", TEXTS[0], CHANGES),
        ("model", "nobody:latest", "not found"),
    ),
)
OLLAMA_ONE = Shape(
    "/api/embeddings",
    {"model": V3, "prompt": TEXTS[0]},
    (("prompt", TEXTS[1], CHANGES), ("options", {"num_ctx": 16}, "num_ctx"), ("prompt", 7, REFUSED)),
)
VOYAGE_MULTIMODAL = Shape(
    "/v1/multimodalembeddings",
    {"model": CLIP, "inputs": [{"content": [{"type": "text", "text": TEXTS[0]}]}]},
    (
        ("input_type", "query", SAME),
        ("input_type", "summary", REFUSED),
        ("truncation", True, SAME),
        ("output_encoding", "base64", CHANGES),
        ("output_encoding", "hex", REFUSED),
        ("output_dtype", "int8", CHANGES),
        ("output_dtype", "int4", REFUSED),
        ("inputs", [{"content": [{"type": "video_url", "video_url": "https://a"}]}], REFUSED),
        ("inputs", [{"content": [{"type": "image_url"}]}], "image_url"),
    ),
)
OURS = Shape(
    "/v1/embeddings",
    {"model": V2, "input": TEXTS},
    (
        ("output_dimension", 64, REFUSED),
        ("output_dimension", 768, SAME),
        ("output_dimensionality", 64, REFUSED),
        ("dimensions", 64, SAME),
        ("output_dtype", "int8", CHANGES),
        ("output_dtype", "int4", REFUSED),
        ("truncation", True, SAME),
        ("normalize", False, CHANGES),
        ("input_type", "query", SAME),
        ("input_type", "summary", REFUSED),
        ("prompt_name", "query", REFUSED),
        ("truncate_prompt_tokens", 5, REFUSED),
        ("truncation_side", "left", REFUSED),
        ("truncation_direction", "Left", REFUSED),
        ("add_special_tokens", True, SAME),
        ("add_special_tokens", False, REFUSED),
        ("embed_dtype", "float16", REFUSED),
        ("endianness", "big", REFUSED),
        ("modality", "image", REFUSED),
        ("title", "hello", REFUSED),
        ("user", "me", SAME),
        ("nobody_knows", 1, SAME),
    ),
)
OURS_WITH_SIDES = Shape(
    "/v1/embeddings",
    {"model": COLBERT, "input": TEXTS},
    (
        ("task_type", "RETRIEVAL_QUERY", CHANGES),
        ("task_type", "RETRIEVAL_DOCUMENT", SAME),
        ("task_type", "CLUSTERING", REFUSED),
        ("input_type", "search_query", CHANGES),
    ),
)
OUR_RANKING_OF_FIXED_LENGTH = Shape(
    "/v1/rerank",
    {"model": RERANKER, "query": "fox", "documents": TEXTS},
    (("max_tokens_per_doc", 3, REFUSED), ("max_tokens_per_doc", None, SAME)),
)
OUR_RANKING = Shape(
    "/v1/rerank",
    {"model": MODEL, "query": "fox", "documents": TEXTS},
    (
        ("top_k", 1, CHANGES),
        ("truncation", True, SAME),
        ("max_tokens_per_doc", 3, CHANGES),
        ("raw_scores", True, REFUSED),
        ("return_text", True, REFUSED),
        ("truncate_prompt_tokens", 5, REFUSED),
        ("truncation_direction", "Left", REFUSED),
        ("nobody_knows", 1, SAME),
    ),
)
SHAPES = (
    COHERE_EMBED,
    COHERE_EMBED.on("/v1/embed"),
    COHERE_EMBED.on("/cohere/v2/embed"),
    COHERE_OF_FIXED_WIDTH,
    COHERE_RERANK,
    COHERE_RERANK.on("/cohere/v1/rerank"),
    COHERE_RERANK_OF_CHOSEN_LENGTH,
    COHERE_RERANK_V1,
    COHERE_RERANK_V1.on("/cohere/v1/rerank"),
    TEI_EMBED,
    TEI_OF_FIXED_WIDTH,
    TEI_SPARSE,
    TEI_ALL,
    TEI_SIMILARITY,
    TEI_RERANK,
    GEMINI,
    GEMINI_UNTITLED,
    OLLAMA,
    OLLAMA_ONE,
    VOYAGE_MULTIMODAL,
    OURS,
    OURS_WITH_SIDES,
    OUR_RANKING,
    OUR_RANKING_OF_FIXED_LENGTH,
)


def answered(answer: Answer) -> Any:
    assert answer.status == 200, answer.json
    body = answer.json
    return {k: v for k, v in body.items() if k not in VOLATILE} if isinstance(body, dict) else body


def alike(one: Any, other: Any) -> bool:
    """Whether two answers say the same, whatever batches their texts were in."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=1e-4)
    return one == other


def reason(path: str, answer: Answer) -> str:
    """What the vendor's client shows of a refusal."""
    body = answer.json
    error = body["error"]
    if path.startswith(("/v2/", "/cohere/", "/v1/embed")) and not path.startswith("/v1/embeddings"):
        return body["message"]
    return error if isinstance(error, str) else error["message"]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.path} {shape.body.get('model', '')}")
def test_each_field_is_honoured_or_refused(vendors: Api, shape: Shape) -> None:
    plain = answered(vendors.post(shape.body, shape.path))
    wrong: list[str] = []
    for name, value, what in shape.fields:
        answer = vendors.post(shape.body | {name: value}, shape.path)
        if what in (CHANGES, SAME):
            came = f"{answer.status} {answer.body[:200]!r}"
            if answer.status == 200:
                came = SAME if alike(answered(answer), plain) else CHANGES
        else:
            word = name if what == REFUSED else what
            refused = answer.status in (400, 422) and word in reason(shape.path, answer)
            came = what if refused else f"{answer.status} {answer.body[:200]!r}"
        if came != what:
            wrong.append(f"{name}={value!r}: {came}, not {what}")
    assert not wrong, "\n".join(wrong)


def ours(api: Api, model: str, texts: Any = TEXTS, **fields: Any) -> list[Any]:
    answer = api.embed(texts, model=model, **fields)
    assert answer.status == 200, answer.json
    return [item.get("embedding", item.get("embeddings")) for item in answer.json["data"]]


def test_tei_has_the_tokens_of_a_model_that_pools(vendors: Api) -> None:
    found = vendors.post({"inputs": TEXTS}, "/embed_all").json
    tokenizer = AutoTokenizer.from_pretrained(minilm_directory())
    stock = BertModel.from_pretrained(minilm_directory(), dtype=torch.float32).eval()
    for text, rows in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            states = stock(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(np.asarray(rows), states.numpy(), atol=1e-4)


@pytest.mark.parametrize("model", [V2, V3])
def test_tei_pools_what_it_has_of_the_tokens(vendors: Api, model: str) -> None:
    tokens = vendors.post({"inputs": TEXTS, "model": model}, "/embed_all").json
    means = [np.mean(rows, axis=0) for rows in tokens]
    np.testing.assert_allclose(means, ours(vendors, model, normalized=False), rtol=1e-4, atol=1e-5)


def test_tei_bounds_the_tokens_of_a_call(vendors: Api) -> None:
    refused = vendors.post({"inputs": ["word " * 600] * 90, "truncate": True}, "/embed_all")
    assert (refused.status, refused.json["error_type"]) == (400, "Validation")
    assert "46,080 tokens" in refused.json["error"]
    assert "43,690" in refused.json["error"]


def test_tei_vectors_of_each_kind(vendors: Api) -> None:
    assert alike(vendors.post({"inputs": TEXTS}, "/").json, ours(vendors, MODEL))
    assert alike(vendors.post({"inputs": TEXTS, "model": COLBERT}, "/embed_all").json, ours(vendors, COLBERT))
    sparse = vendors.post({"inputs": TEXTS}, "/embed_sparse").json
    expected = ours(vendors, ELSER)
    assert [len(entries) for entries in sparse] == [len(entries) for entries in expected]
    for entries, weights in zip(sparse, expected, strict=True):
        assert all(type(entry["index"]) is int for entry in entries)
        assert alike([entry["value"] for entry in entries], list(weights.values()))
    body = {"inputs": {"source_sentence": "fox", "sentences": TEXTS}}
    source, *others = np.array(ours(vendors, MODEL, ["fox", *TEXTS]))
    np.testing.assert_allclose(vendors.post(body, "/similarity").json, others @ source, atol=1e-5)


def test_tei_info(vendors: Api) -> None:
    spec = Catalog.load().require(MODEL)
    info = get(vendors.stack.http_port, "/info", vendors.authorization).json
    assert info == {
        "model_id": spec.repository,
        "model_sha": spec.revision if spec.pinned else None,
        "model_dtype": "float32",
        "model_type": {"embedding": {"pooling": "mean"}},
        "max_concurrent_requests": 4096,
        "max_input_length": spec.context_length,
        "max_batch_tokens": info["max_batch_tokens"],
        "max_batch_requests": None,
        "max_client_batch_size": 2048,
        "auto_truncate": False,
        "tokenization_workers": 1,
        "version": info["version"],
        "sha": None,
        "docker_label": None,
    }
    assert info["max_batch_tokens"] > 0


def test_cohere_v1_rankings(vendors: Api) -> None:
    body = {"model": RERANKER, "query": "fox", "documents": TEXTS, "return_documents": True}
    of_its_own = vendors.post(body, "/cohere/v1/rerank").json
    assert of_its_own["meta"] == {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}}
    assert {each["document"]["text"] for each in of_its_own["results"]} == set(TEXTS)
    # Its clients say who they are where the path is one of ours.
    named = post(
        vendors.stack.http_port, body, vendors.authorization | {"x-fern-sdk-name": "cohere"}, "/v1/rerank"
    ).json
    assert alike(named["results"], of_its_own["results"])
    assert named["meta"] == of_its_own["meta"]
    assert "meta" not in vendors.post(body, "/v1/rerank").json
    read = vendors.rerank("fox", [each["title"] for each in DOCUMENTS], model=RERANKER).json["results"]
    fields = {"documents": DOCUMENTS, "rank_fields": ["title"]}
    ranked = vendors.post(body | fields, "/v1/rerank").json["results"]
    assert [each["index"] for each in ranked] == [each["index"] for each in read]
    assert [each["document"] for each in ranked] == [DOCUMENTS[each["index"]] for each in read]
    many = vendors.post(body | {"documents": TEXTS * 51}, "/v2/rerank").json
    assert many["meta"]["billed_units"] == {"search_units": 2}


def contents(*texts: str, **options: Any) -> list[dict[str, Any]]:
    return [{"content": {"parts": [{"text": text}]}, **options} for text in texts]


def test_gemini(vendors: Api) -> None:
    path = f"/v1beta/models/{V3}:batchEmbedContents"
    requests = [
        *contents(TEXTS[0], taskType="RETRIEVAL_QUERY", model=f"models/{V3}"),
        *contents(*TEXTS, outputDimensionality=32),
        *contents(TEXTS[1], taskType="RETRIEVAL_QUERY"),
        *contents(TEXTS[1], taskType="RETRIEVAL_DOCUMENT", title="a fox"),
    ]
    queries = ours(vendors, V3, task="retrieval.query")
    short = ours(vendors, V3, dimensions=32)
    titled = ours(vendors, V3, [f"a fox\n{TEXTS[1]}"], task="retrieval.passage")
    answer = vendors.post({"requests": requests}, path).json
    values = [each["values"] for each in answer["embeddings"]]
    assert alike(values, [queries[0], *short, queries[1], *titled])
    key = {"x-goog-api-key": vendors.key}
    single = post(vendors.stack.http_port, requests[0], key, f"/v1beta/models/{V3}:embedContent").json
    assert alike(single["embedding"]["values"], queries[0])
    in_query = post(
        vendors.stack.http_port, requests[0], path=f"/v1/models/{V3}:embedContent?key={vendors.key}"
    )
    assert in_query.json == single
    wrong = vendors.post({"requests": [*requests, *contents("a", taskType="NO")]}, path)
    assert (wrong.status, wrong.json["error"]["status"]) == (422, "INVALID_ARGUMENT")
    place = vendors.post({"requests": [*contents("a"), *contents("a", outputDimensionality=0)]}, path)
    assert place.json["errors"][0]["field"] == "body -> requests -> 1 -> outputDimensionality"


def test_gemini_and_voyage_take_images(vendors: Api) -> None:
    picture = base64.b64encode(saved(noise(32, 24))).decode()
    url = f"data:image/png;base64,{picture}"
    expected = ours(vendors, CLIP, [{"image": url}])[0]
    part = {"inlineData": {"mimeType": "image/png", "data": picture}}
    body = {"content": {"parts": [part]}}
    gemini = vendors.post(body, f"/v1beta/models/{CLIP}:embedContent").json
    assert alike(gemini["embedding"]["values"], expected)
    inputs = [{"content": [{"type": "image_base64", "image_base64": url}]}]
    voyage = vendors.post({"model": CLIP, "inputs": inputs}, "/v1/multimodalembeddings").json
    assert alike(voyage["data"][0]["embedding"], expected)
    assert voyage["usage"]["image_pixels"] == 224 * 224
    assert voyage["usage"]["video_pixels"] == 0
    cohere = vendors.post({"model": CLIP, "images": [url], "input_type": "image"}, "/v2/embed").json
    assert alike(cohere["embeddings"]["float"][0], expected)


def test_ollama(vendors: Api) -> None:
    answer = vendors.post({"model": f"{MODEL}:latest", "input": TEXTS}, "/api/embed").json
    assert answer["model"] == f"{MODEL}:latest"
    assert alike(answer["embeddings"], ours(vendors, MODEL))
    assert answer["prompt_eval_count"] == vendors.embed(TEXTS).json["usage"]["total_tokens"]
    assert vendors.post({"model": MODEL, "input": []}, "/api/embed").json["embeddings"] == []
    one = vendors.post({"model": MODEL, "prompt": TEXTS[0]}, "/api/embeddings").json
    assert alike(one["embedding"], ours(vendors, MODEL)[0])
    listed = {each["model"]: each for each in get(vendors.stack.http_port, "/api/tags").json["models"]}
    assert f"{MODEL}:latest" in listed
    shown = vendors.post({"model": MODEL}, "/api/show").json
    assert shown["details"] == listed[f"{MODEL}:latest"]["details"]
    assert shown["model_info"]["bert.embedding_length"] == 384
    assert shown["capabilities"] == ["embedding"]
    assert get(vendors.stack.http_port, "/api/version").json["version"]
    missing = vendors.post({"model": "nobody"}, "/api/show")
    assert (missing.status, "nobody" in missing.json["error"]) == (400, True)


def test_models_in_geminis_form(vendors: Api) -> None:
    port = vendors.stack.http_port
    models = get(port, "/v1beta/models").json["models"]
    assert {each["name"] for each in models} >= {f"models/{MODEL}", f"models/{V3}"}
    assert get(port, f"/v1beta/models/{V3}").json in models


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v2/embed", lambda body: body["message"]),
        ("/embed_all", lambda body: body["error"]),
        (f"/v1beta/models/{V3}:embedContent", lambda body: body["error"]["message"]),
        ("/api/embed", lambda body: body["error"]),
        ("/v1/multimodalembeddings", lambda body: body["error"]["message"]),
    ],
)
def test_a_missing_key_is_told_in_each_form(vendors: Api, path: str, shown: Any) -> None:
    answer = post(vendors.stack.http_port, {}, path=path)
    assert answer.status == 401
    assert shown(answer.json) == answer.json["detail"]
    assert "API key" in answer.json["detail"]


@pytest.fixture(scope="module")
def narrow(vendors: Api) -> Api:
    """A key that is over its limit with every text."""
    return Api(vendors.stack, vendors.stack.create_key("--tier", "narrow"))


INPUTS = {"inputs": TEXTS}


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v2/embed", COHERE_EMBED.body, {"message"}),
        ("/v1/embed", COHERE_EMBED.body, {"message"}),
        ("/v2/rerank", {"model": MODEL, "query": "fox", "documents": TEXTS}, {"message"}),
        ("/cohere/v1/rerank", {"model": MODEL, "query": "fox", "documents": TEXTS}, {"message"}),
        ("/embed", INPUTS, {"error"}),
        ("/embed_all", INPUTS, {"error"}),
        ("/embed_sparse", INPUTS, {"error"}),
        ("/similarity", TEI_SIMILARITY.body, {"error"}),
        ("/rerank", {"query": "fox", "texts": TEXTS}, {"error"}),
        (
            f"/v1beta/models/{V3}:embedContent",
            {"content": {"parts": [{"text": "a fox"}]}},
            {"error", "message"},
        ),
        ("/api/embed", {"model": MODEL, "input": TEXTS}, {"error"}),
        ("/v1/embeddings", {"model": MODEL, "input": TEXTS}, {"error", "message"}),
        (
            "/v1/multimodalembeddings",
            {"model": CLIP, "inputs": [{"content": [{"type": "text", "text": "a fox"}]}]},
            {"error", "message"},
        ),
    ],
)
def test_a_limit_is_told_in_each_form(narrow: Api, path: str, body: dict[str, Any], fields: set[str]) -> None:
    answer = narrow.post(body, path)
    assert answer.status == 429, answer.json
    assert answer.json["code"] == "RATE_TOKEN_LIMIT_EXCEEDED"
    assert int(answer.headers["retry-after"]) > 0
    shown = answer.json
    for name in ("error", "message"):
        shown = shown[name] if name in fields else shown
    assert shown == answer.json["detail"]
    assert "/1 tokens per minute" in shown


def test_a_limit_is_of_the_kind_that_clients_wait_for(narrow: Api) -> None:
    assert narrow.post(INPUTS, "/embed").json["error_type"] == "Overloaded"
    body = {"content": {"parts": [{"text": "a fox"}]}}
    told = narrow.post(body, f"/v1beta/models/{V3}:embedContent").json["error"]
    assert (told["code"], told["status"]) == (429, "RESOURCE_EXHAUSTED")
    error = narrow.embed(TEXTS).json["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")


def test_there_is_a_form_for_each_vendor_of_the_table() -> None:
    assert {form.name for form in FORMS} == {"Cohere", "Tei", "Gemini", "Ollama"}
