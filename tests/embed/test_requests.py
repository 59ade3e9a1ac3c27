"""Bodies of POST /v1/embeddings: what is taken, and the exact 422 of what is not."""

from __future__ import annotations

from typing import Any

import pytest

from services.core.catalog import Catalog
from services.core.errors import ErrorCode, ServiceError
from services.embed.parsing import RequestParser
from services.embed.types import EmbedRequest, Encoding

CATALOG = Catalog.load(aliases={"house-model": "all-MiniLM-L6-v2"})
MINILM = "all-MiniLM-L6-v2"
V2 = "jina-embeddings-v2-base-en"
V3 = "jina-embeddings-v3"
CODE = "jina-code-embeddings-0.5b"
COLBERT = "jina-colbert-v2"
SERVED = CATALOG.select([MINILM, V2, V3, CODE, COLBERT, "jina-reranker-v2-base-multilingual"])
PARSER = RequestParser(CATALOG, SERVED, max_items=8)

ITEM = "Input should be a string or an object with 'text'"
ENCODING = "Input should be 'float', 'base64', 'binary', 'ubinary', 'int8' or 'uint8'"
TOKEN_IDS = (
    "Arrays of token ids are not supported. Send the text itself "
    "(with LangChain's OpenAIEmbeddings, set check_embedding_ctx_length=False)."
)


def parse(**body: Any) -> EmbedRequest:
    return PARSER.parse({"model": MINILM, "input": "a"} | body)


def refusal(body: dict[str, Any]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        PARSER.parse(body)
    return caught.value


def errors(body: dict[str, Any]) -> list[tuple[str, str, str]]:
    error = refusal(body)
    assert error.code is ErrorCode.VALIDATION_ERROR
    return [(e.field, e.type, e.message) for e in error.field_errors]


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("one", ["one"]),
        ({"text": "one"}, ["one"]),
        ({"text": "one", "type": "text"}, ["one"]),
        (["one"], ["one"]),
        (["one", {"text": "two"}], ["one", "two"]),
        ([{"text": "one", "id": 7}, {"text": ""}], ["one", ""]),
        ("", [""]),
        ([""], [""]),
        (" \t\n", [" \t\n"]),
        ("a\0b", ["a\0b"]),
        ("data:image/png;base64,AAAA", ["data:image/png;base64,AAAA"]),
        (["x"] * 8, ["x"] * 8),
    ],
)
def test_every_form_of_input(value: Any, texts: list[str]) -> None:
    assert list(parse(input=value).contents) == texts


def test_defaults() -> None:
    assert PARSER.parse({"model": MINILM, "input": "a"}) == EmbedRequest(model=MINILM, contents=["a"])


@pytest.mark.parametrize("model", [MINILM, V2, V3, CODE])
def test_null_stands_for_the_default(model: str) -> None:
    names = ("embedding_type", "normalized", "truncate", "dimensions", "task")
    body = {"model": model, "input": "a"}
    assert PARSER.parse(body | dict.fromkeys(names)) == PARSER.parse(body)


def test_fields_reach_the_request() -> None:
    body = {
        "model": V3, "input": ["a"], "task": "separation", "dimensions": 64, "normalized": False,
        "truncate": True, "embedding_type": "base64",
    }  # fmt: skip
    assert PARSER.parse(body) == EmbedRequest(
        model=V3, contents=["a"], encodings=(Encoding.BASE64,), task="separation", dimensions=64,
        normalized=False, truncate=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("alias", "value", "name", "parsed"),
    [
        ("encoding_format", "base64", "encodings", (Encoding.BASE64,)),
        ("encoding_type", "ubinary", "encodings", (Encoding.UBINARY,)),
        ("embedding_types", ["binary", "float"], "encodings", (Encoding.BINARY, Encoding.FLOAT)),
        ("task_type", "classification", "task", "classification"),
        ("output_dimensionality", 32, "dimensions", 32),
        ("output_dimension", 32, "dimensions", 32),
        ("truncation", True, "truncate", True),
    ],
)
def test_names_of_other_vendors(alias: str, value: Any, name: str, parsed: Any) -> None:
    assert getattr(PARSER.parse({"model": V3, "input": "a", alias: value}), name) == parsed


MANY_WORDS = [
    ("query", "retrieval.query", "nl2code.query"),
    ("document", "retrieval.passage", "nl2code.passage"),
    ("search_query", "retrieval.query", "nl2code.query"),
    ("search_document", "retrieval.passage", "nl2code.passage"),
    ("classification", "classification", None),
    ("clustering", "separation", None),
]
GEMINI = [
    ("RETRIEVAL_QUERY", "retrieval.query", "nl2code.query"),
    ("RETRIEVAL_DOCUMENT", "retrieval.passage", "nl2code.passage"),
    ("QUESTION_ANSWERING", "retrieval.query", "qa.query"),
    ("FACT_VERIFICATION", "retrieval.query", "nl2code.query"),
    ("CODE_RETRIEVAL_QUERY", "retrieval.query", "nl2code.query"),
    ("SEMANTIC_SIMILARITY", "text-matching", None),
    ("CLASSIFICATION", "classification", None),
    ("CLUSTERING", "separation", None),
]


@pytest.mark.parametrize(
    ("field", "word", "of_v3", "of_code"),
    [
        *(("input_type", *row) for row in MANY_WORDS),
        *(("task_type", *row) for row in GEMINI),
        *(("task", *row) for row in GEMINI),
        ("prompt_name", "query", "retrieval.query", "nl2code.query"),
        ("prompt_name", "passage", "retrieval.passage", "nl2code.passage"),
    ],
)
def test_what_others_say_of_the_use_of_vectors(
    field: str, word: str, of_v3: str, of_code: str | None
) -> None:
    assert parse(model=V3, input="a", **{field: word}).task == of_v3
    if of_code is not None:
        assert parse(model=CODE, input="a", **{field: word}).task == of_code
    else:
        path = f"body -> {CODE} -> {field}"
        ((place, kind, message),) = errors({"model": CODE, "input": "a", field: word})
        assert (place, kind) == (path, "literal_error")
        assert word in message


def test_no_task_is_the_default() -> None:
    assert parse(model=V3, input="a", task_type="TASK_TYPE_UNSPECIFIED").task is None
    assert parse(model=V3, input="a", input_type=None, prompt_name=None).task is None


def test_our_own_word_wins() -> None:
    assert parse(model=V3, input="a", task="separation", input_type="query").task == "separation"


def test_sides_of_a_model_without_tasks() -> None:
    for word, side in [("query", "query"), ("search_query", "query"), ("search_document", "document")]:
        assert parse(model=COLBERT, input="a", input_type=word).role.value == side
    assert errors({"model": COLBERT, "input": "a", "input_type": "clustering"})


@pytest.mark.parametrize("model", [MINILM, V2])
def test_a_model_whose_sides_are_one(model: str) -> None:
    plain = parse(model=model, input="a")
    for word in ("query", "document", "search_query", "search_document", "classification", "clustering"):
        assert parse(model=model, input="a", input_type=word) == plain


@pytest.mark.parametrize(
    ("model", "field", "word"),
    [
        (MINILM, "input_type", "image"),
        (MINILM, "input_type", "Query"),
        (MINILM, "prompt_name", "query"),
        (V3, "input_type", "passage"),
        (V3, "input_type", 3),
        (V3, "prompt_name", "s2p_query"),
        (V3, "task_type", "RETRIEVAL"),
        (COLBERT, "input_type", "image"),
    ],
)
def test_words_that_mean_nothing_are_refused(model: str, field: str, word: Any) -> None:
    ((place, kind, _),) = errors({"model": model, "input": "a", field: word})
    assert kind == "literal_error"
    assert place.startswith(
        f"body -> {model} -> task" if field == "task_type" else f"body -> {model} -> {field}"
    )


@pytest.mark.parametrize("kind", ["float", "int8", "uint8", "binary", "ubinary"])
def test_voyages_kinds_of_numbers(kind: str) -> None:
    assert parse(model=MINILM, input="a", output_dtype=kind).encodings == (Encoding(kind),)
    packed = parse(model=MINILM, input="a", output_dtype=kind, encoding_format="base64").encodings
    assert packed == (Encoding.BASE64 if kind == "float" else Encoding(f"{kind}_base64"),)


@pytest.mark.parametrize("kind", ["int4", "base64", "int8_base64", 8, []])
def test_kinds_of_numbers_that_are_none(kind: Any) -> None:
    for format in (None, "base64"):
        body = {"model": MINILM, "input": "a", "output_dtype": kind, "encoding_format": format}
        assert [place for place, _, _ in errors(body)] == [f"body -> {MINILM} -> output_dtype"]


def test_numbers_and_flags_as_low_code_tools_write_them() -> None:
    asked = parse(model=V3, input="a", dimensions="64", normalized="false", truncate=1, late_chunking="0")
    assert (asked.dimensions, asked.normalized, asked.truncate, asked.late_chunking) == (
        64,
        False,
        True,
        False,
    )


def test_the_name_of_a_repository() -> None:
    assert parse(model="sentence-transformers/all-MiniLM-L6-v2", input="a").model == MINILM
    assert parse(model="jinaai/jina-embeddings-v3", input="a").model == V3


@pytest.mark.parametrize("alias", ["texts", "content"])
def test_other_names_of_the_input(alias: str) -> None:
    assert PARSER.parse({"model": MINILM, alias: ["a", "b"]}).contents == ["a", "b"]


def test_the_real_name_wins_over_an_alias() -> None:
    request = parse(embedding_type="binary", encoding_format="base64", dimensions=3, output_dimension=4)
    assert (request.encodings, request.dimensions) == ((Encoding.BINARY,), 3)
    assert parse(truncate=None, truncation=True).truncate is False


@pytest.mark.parametrize(
    ("value", "encodings"),
    [
        ("float", ("float",)),
        (["ubinary"], ("ubinary",)),
        (["base64", "float", "base64"], ("base64", "float")),
        (["float", "base64", "binary", "ubinary"], ("float", "base64", "binary", "ubinary")),
    ],
)
def test_encodings(value: Any, encodings: tuple[str, ...]) -> None:
    assert parse(embedding_type=value).encodings == tuple(map(Encoding, encodings))


def test_fields_of_other_models_and_unknown_fields_are_ignored() -> None:
    request = PARSER.parse(
        {"model": V2, "input": "a", "dimensions": 99999, "task": "no such", "late_chunking": "x", "user": 3}
    )
    assert request == EmbedRequest(model=V2, contents=["a"])


def test_models_that_always_normalise_or_cut() -> None:
    assert PARSER.parse({"model": CODE, "input": "a", "normalized": False}).normalized is True
    assert PARSER.parse({"model": COLBERT, "input": "a", "truncate": False}).truncate is True


def test_a_whole_number_may_be_written_as_a_float() -> None:
    assert parse(dimensions=12.0).dimensions == 12


@pytest.mark.parametrize(
    ("name", "id"),
    [(MINILM, MINILM), (f"jina-ai/{V3}", V3), (f"jinaai/{V3}", V3), ("house-model", "house-model")],
)
def test_names_of_models(name: str, id: str) -> None:
    assert PARSER.parse({"model": name, "input": "a"}).model == id


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nothing-like-it",
        "jina-embeddings-v4",
        "jina-reranker-v2-base-multilingual",
        "other/jina-embeddings-v3",
    ],
)
def test_models_that_are_not_served_for_embedding(name: str) -> None:
    error = refusal({"model": name, "input": 3})  # before its fields are looked at
    assert error.code is ErrorCode.INPUT_MODEL_NOT_FOUND
    served = f"{MINILM}, {V2}, {V3}, {CODE}, {COLBERT}, house-model"
    assert error.detail == f"Model '{name}' not found. Available models: {served}."


def test_a_long_model_name_is_cut() -> None:
    assert len(refusal({"model": "x" * 10_000, "input": "a"}).detail) < 400


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ("body -> model", "missing", "Field required")),
        ({"input": "a"}, ("body -> model", "missing", "Field required")),
        ({"model": None}, ("body -> model", "string_type", "Input should be a valid string")),
        ({"model": ["a"]}, ("body -> model", "string_type", "Input should be a valid string")),
    ],
)
def test_requests_without_a_model(body: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert errors(body) == [expected]


@pytest.mark.parametrize(
    ("fields", "place", "kind", "message"),
    [
        ({}, ["input"], "missing", "Field required"),
        ({"input": None}, ["input"], "text_type", ITEM),
        ({"input": 3}, ["input"], "text_type", ITEM),
        ({"input": True}, ["input"], "text_type", ITEM),
        ({"input": {}}, ["input", "text"], "missing", "Field required"),
        ({"input": {"text": None}}, ["input", "text"], "string_type", "Input should be a valid string"),
        ({"input": ["a", 3.5]}, ["input", 1], "text_type", ITEM),
        ({"input": ["a", None]}, ["input", 1], "text_type", ITEM),
        ({"input": ["a", {"title": "b"}]}, ["input", 1, "text"], "missing", "Field required"),
        ({"input": [{"text": 1}]}, ["input", 0, "text"], "string_type", "Input should be a valid string"),
        ({"input": [["a"]]}, ["input", 0], "text_type", ITEM),
        ({"input": [[[[]]]]}, ["input", 0], "text_type", ITEM),
        ({"input": []}, [], "too_short", "Input list cannot be empty. Provide at least one item."),
        ({"texts": []}, [], "too_short", "Input list cannot be empty. Provide at least one item."),
        ({"input": ["a"] * 9}, [], "too_long", "Each input list can contain at most 8 items."),
        ({"input": [101, 2023, 102]}, ["input"], "token_ids_not_supported", TOKEN_IDS),
        ({"input": [[101, 102], [101, 102]]}, ["input"], "token_ids_not_supported", TOKEN_IDS),
        ({"input": ["a", [101, 102]]}, ["input"], "token_ids_not_supported", TOKEN_IDS),
        ({"embedding_type": "int3"}, ["embedding_type"], "literal_error", ENCODING),
        ({"embedding_type": 1}, ["embedding_type"], "literal_error", ENCODING),
        ({"embedding_type": {}}, ["embedding_type"], "literal_error", ENCODING),
        ({"embedding_type": ["float", "int8_base64"]}, ["embedding_type", 1], "literal_error", ENCODING),
        ({"encoding_format": "int8_base64"}, ["encoding_format"], "literal_error", ENCODING),
        (
            {"embedding_type": []},
            ["embedding_type"],
            "too_short",
            "List should have at least 1 item after validation, not 0",
        ),
        ({"dimensions": 385}, ["dimensions"], "less_than_equal", "Input should be less than or equal to 384"),
        ({"dimensions": 0}, ["dimensions"], "greater_than", "Input should be greater than 0"),
        ({"dimensions": -1}, ["dimensions"], "greater_than", "Input should be greater than 0"),
        ({"dimensions": 1.5}, ["dimensions"], "int_type", "Input should be a valid integer"),
        ({"dimensions": "64.5"}, ["dimensions"], "int_type", "Input should be a valid integer"),
        ({"dimensions": True}, ["dimensions"], "int_type", "Input should be a valid integer"),
        ({"normalized": 2}, ["normalized"], "bool_type", "Input should be a valid boolean"),
        ({"truncate": "yes"}, ["truncate"], "bool_type", "Input should be a valid boolean"),
        ({"truncation": "yes"}, ["truncation"], "bool_type", "Input should be a valid boolean"),
    ],
)
def test_refused_fields(fields: dict[str, Any], place: list[str | int], kind: str, message: str) -> None:
    needed = {} if {"input", "texts"} & fields.keys() or not fields else {"input": "a"}
    path = " -> ".join(["body", MINILM, *map(str, place)])
    assert errors({"model": MINILM} | needed | fields) == [(path, kind, message)]


@pytest.mark.parametrize("key", ["image", "audio", "video", "pdf", "content", "url", "bytes"])
def test_media_for_a_model_of_texts(key: str) -> None:
    message = f"Model '{MINILM}' takes text only, not '{key}'."
    field = f"body -> {MINILM} -> input"
    assert errors({"model": MINILM, "input": {key: "x"}}) == [(field, "unsupported_modality", message)]
    assert errors({"model": MINILM, "input": ["a", {key: "x"}]}) == [
        (f"{field} -> 1", "unsupported_modality", message)
    ]


def test_tasks_are_those_of_the_model() -> None:
    tasks = "'retrieval.query', 'retrieval.passage', 'text-matching', 'classification' or 'separation'"
    assert errors({"model": V3, "input": "a", "task": "clustering"}) == [
        (f"body -> {V3} -> task", "literal_error", f"Input should be {tasks}")
    ]


def test_dimensions_of_a_model_with_choices() -> None:
    assert PARSER.parse({"model": COLBERT, "input": "a", "dimensions": 96}).dimensions == 96
    assert errors({"model": COLBERT, "input": "a", "dimensions": 100}) == [
        (f"body -> {COLBERT} -> dimensions", "literal_error", "Input should be 64, 96 or 128")
    ]


def test_several_errors_are_all_named() -> None:
    body = {"model": V3, "input": ["a", 1.5, None], "dimensions": 0, "task": "x"}
    fields = [field for field, _, _ in errors(body)]
    prefix = f"body -> {V3}"
    assert sorted(fields) == [
        f"{prefix} -> dimensions", f"{prefix} -> input -> 1", f"{prefix} -> input -> 2", f"{prefix} -> task"
    ]  # fmt: skip
    assert refusal(body).detail.startswith("Validation errors in 4 fields")


def test_wording_of_the_hosted_service() -> None:
    detail = refusal({"model": V3, "input": ["a"] * 9}).detail
    assert detail == f"Validation error: 'body -> {V3}' Each input list can contain at most 8 items."


def test_many_bad_items_are_not_all_named() -> None:
    parser = RequestParser(CATALOG, SERVED, max_items=2048)
    with pytest.raises(ServiceError) as caught:
        parser.parse({"model": MINILM, "input": [None] * 2048})
    assert len(caught.value.field_errors) == 10


def test_refused_values_are_shown() -> None:
    error = refusal({"model": MINILM, "input": ["a", {"image": "x"}], "dimensions": "many"})
    assert [e.input for e in error.field_errors] == [{"image": "x"}, "many"]
