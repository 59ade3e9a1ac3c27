"""What ``GET /v1/models`` says."""

from __future__ import annotations

import jsonschema
import pytest

from services.core.catalog import Catalog, model_info, models_list

STRINGS = {"type": "array", "items": {"type": "string"}}
PRICES = ("prompt", "completion", "image", "request", "input_cache_read", "input_cache_write")
MODEL_INFO = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "hugging_face_id": {"type": "string"},
        "name": {"type": "string"},
        "created": {"type": "integer"},
        "input_modalities": STRINGS,
        "output_modalities": STRINGS,
        "quantization": {"type": "string"},
        "context_length": {"type": "integer"},
        "max_output_length": {"type": "integer"},
        "pricing": {
            "type": "object",
            "properties": {price: {"type": "string"} for price in PRICES},
            "required": list(PRICES),
            "additionalProperties": False,
        },
        "supported_sampling_parameters": STRINGS,
        "supported_features": STRINGS,
        "description": {"type": "string"},
        "datacenters": {"type": "array"},
    },
}
MODEL_INFO["required"] = list(MODEL_INFO["properties"])


@pytest.mark.parametrize("name", sorted(Catalog.load().models))
def test_every_entry_has_the_form_of_the_api(name: str) -> None:
    jsonschema.validate(model_info(Catalog.load().require(name)), MODEL_INFO)


def test_a_jina_model_is_listed_as_the_hosted_service_lists_it() -> None:
    info = model_info(Catalog.load().require("jina-embeddings-v3"))
    assert info["id"] == "jina-ai/jina-embeddings-v3"
    assert info["hugging_face_id"] == "jinaai/jina-embeddings-v3"
    assert info["created"] == 1725840000
    assert (info["context_length"], info["max_output_length"]) == (8192, 1024)
    assert (info["input_modalities"], info["output_modalities"]) == (["text"], ["embeddings"])
    assert set(info["pricing"].values()) == {"0"}


def test_the_list_carries_what_openai_clients_look_for() -> None:
    answer = models_list([Catalog.load().require("all-MiniLM-L6-v2")])
    assert answer["object"] == "list"
    (entry,) = answer["data"]
    assert (entry["id"], entry["object"]) == ("all-MiniLM-L6-v2", "model")
    assert entry["owned_by"] == "sentence-transformers"


def test_kinds_of_output_are_told() -> None:
    catalog = Catalog.load()
    kinds = {
        name: model_info(catalog.require(name))["output_modalities"]
        for name in ("jina-embeddings-v4", "jina-reranker-m0", "jina-reranker-v3", "jina-vlm", "elser-v2")
    }
    assert kinds == {
        "jina-embeddings-v4": ["embeddings"],
        "jina-reranker-m0": ["scores"],
        "jina-reranker-v3": ["scores", "embeddings"],
        "jina-vlm": ["text"],
        "elser-v2": ["embeddings"],
    }


def test_an_alias_is_open_about_itself() -> None:
    info = model_info(Catalog.load(None, {"mine": "jina-embeddings-v3"}).require("mine"))
    assert info["id"] == "mine"
    assert info["hugging_face_id"] == "jinaai/jina-embeddings-v3"
    assert "alias of jina-embeddings-v3" in info["name"]
