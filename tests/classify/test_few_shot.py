"""Trained classifiers through both doors, over the real server, engine, model and a SQLite file."""

from __future__ import annotations

import asyncio
import re
import uuid
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from prometheus_client import REGISTRY
from searchfoundation.v1 import classify_pb2, common_pb2

from services.core.call import Call
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions
from tests.classify.conftest import Rig, refused
from tests.classify.tickets import split
from tests.rig import ALIAS, MINILM, detail

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("clean")]

UNKNOWN = "00000000-0000-4000-8000-000000000000"
PAIRS = [
    ("the cat sleeps on the sofa", "cat"),
    ("a kitten plays with wool", "cat"),
    ("the dog barks at the postman", "dog"),
    ("a puppy digs in the garden", "dog"),
]


def examples(pairs: list[tuple[str, str]] = PAIRS) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for text, label in pairs]


async def token_count(rig: Rig, texts: list[str]) -> int:
    return sum((await rig.engine.embedder(MINILM).embed(texts, EmbedOptions(), Call("test"))).token_counts)


async def test_learns_a_real_task(rig: Rig) -> None:
    learned, held_out = split(30, seed=0)
    made = await rig.train(model=MINILM, input=examples(learned))
    assert made["num_samples"] == len(learned)
    assert uuid.UUID(made["classifier_id"]).version == 4
    texts = [text for text, _ in held_out]
    answer = await rig.classify(classifier_id=made["classifier_id"], input=texts)
    right = sum(
        item["prediction"] == label for item, (_, label) in zip(answer["data"], held_out, strict=True)
    )
    assert right / len(held_out) >= 0.85
    labels = list(dict.fromkeys(label for _, label in learned))
    for index, item in enumerate(answer["data"]):
        scores = [each["score"] for each in item["predictions"]]
        assert item["index"] == index
        assert [each["label"] for each in item["predictions"]] == labels
        assert sum(scores) == pytest.approx(1.0, abs=1e-6)
        assert item["score"] == max(scores)
    assert answer["usage"]["total_tokens"] == await token_count(rig, texts)


async def test_the_same_examples_make_the_same_classifier(rig: Rig) -> None:
    ids = [(await rig.train(model=MINILM, input=examples()))["classifier_id"] for _ in range(2)]
    answers = [await rig.classify(classifier_id=each, input="a tomcat") for each in ids]
    assert ids[0] != ids[1]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("sent", "iterations"), [({}, 10), ({"num_iters": None}, 10), ({"num_iters": 3}, 3)])
async def test_iterations_multiply_the_tokens_billed(rig: Rig, sent: Any, iterations: int) -> None:
    tokens = iterations * await token_count(rig, [text for text, _ in PAIRS])
    made = await rig.train(model=MINILM, input=examples(), **sent)
    assert made["usage"] == {"total_tokens": tokens}
    assert rig.access.charged == [tokens]


async def test_an_update_learns_new_labels_and_keeps_the_id(rig: Rig) -> None:
    classifier = (await rig.train(model=MINILM, input=examples()))["classifier_id"]
    fish = [("a trout swims in the river", "fish"), ("sharks live in the sea", "fish")]
    updated = await rig.train(classifier_id=classifier, input=examples(fish), num_iters=2)
    assert updated["classifier_id"] == classifier
    assert updated["num_samples"] == 2
    assert updated["usage"]["total_tokens"] == 2 * await token_count(rig, [text for text, _ in fish])
    asked = ["a salmon in the sea", "the kitten on the sofa", "the dog barks"]
    answer = await rig.classify(classifier_id=classifier, input=asked)
    assert [item["prediction"] for item in answer["data"]] == ["fish", "cat", "dog"]
    (listed,) = await rig.listed()
    assert listed["labels"] == ["cat", "dog", "fish"]
    assert listed["updated_number"] == 2
    assert listed["updated_at"] > listed["created_at"]


async def test_an_update_may_be_one_example_outside_a_list(rig: Rig) -> None:
    classifier = await rig.new()
    updated = await rig.train(classifier_id=classifier, input={"text": "one more cat", "label": "cat"})
    assert updated["num_samples"] == 1


async def test_listing(rig: Rig) -> None:
    before = datetime.now(UTC)
    first = await rig.new("a", "b")
    second = await rig.new("c", "d", access="public")
    await rig.classify(classifier_id=second)
    await rig.classify(classifier_id=second.upper(), input=["x", "y"])
    listed = await rig.listed()
    assert [each["classifier_id"] for each in listed] == [first, second]
    assert [each["access"] for each in listed] == ["private", "public"]
    assert [each["labels"] for each in listed] == [["a", "b"], ["c", "d"]]
    assert [each["used_number"] for each in listed] == [0, 2]
    for each in listed:
        assert each["model"] == MINILM
        assert each["updated_number"] == 1
        assert (each["is_active"], each["is_latest"], each["metadata_"]) == (True, True, {})
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", each["created_at"])
        assert before <= datetime.fromisoformat(each["created_at"]) <= datetime.now(UTC)
        uuid.UUID(each["user_id"])
    assert listed[0]["used_at"] is None
    assert datetime.fromisoformat(listed[1]["used_at"]) >= before


async def test_deleting(rig: Rig) -> None:
    classifier = await rig.new()
    answer = await rig.delete(classifier)
    assert answer == {"classifier_id": classifier, "deleted": True, "detail": "Classifier deleted"}
    for work in (rig.delete(classifier), rig.classify(classifier_id=classifier)):
        status, body = await refused(work)
        assert (status, body["code"]) == (404, "RESOURCE_NOT_FOUND")
    assert await rig.listed() == []


@pytest.mark.parametrize("wrong", [UNKNOWN, "cls-2025-07-15-xyz", "", "x" * 5000, "../../etc/passwd", "\x00"])
async def test_ids_that_lead_nowhere(rig: Rig, wrong: str) -> None:
    for work in (
        rig.classify(classifier_id=wrong),
        rig.train(classifier_id=wrong, input=examples()),
        rig.delete(wrong),
    ):
        status, body = await refused(work)
        assert (status, body["code"]) == (404, "RESOURCE_NOT_FOUND")
        assert body["detail"].startswith(f"Classifier '{wrong[:100]}' not found or access denied.")
    assert rig.access.charged == []


async def test_a_classifier_goes_before_model_and_labels(rig: Rig) -> None:
    classifier = await rig.new("a", "b")
    answer = await rig.classify(classifier_id=classifier, model="no-such-model", labels=["x"])
    assert [each["label"] for each in answer["data"][0]["predictions"]] == ["a", "b"]
    updated = await rig.train(classifier_id=classifier, model="no-such-model", input=examples())
    assert updated["classifier_id"] == classifier


async def test_an_alias_keeps_its_name(rig: Rig) -> None:
    classifier = await rig.new(model=ALIAS)
    assert (await rig.listed())[0]["model"] == ALIAS
    assert (await rig.classify(classifier_id=classifier))["data"][0]["prediction"] in ("cat", "dog")


@pytest.mark.parametrize(
    ("fields", "field", "kind"),
    [
        ({"input": examples(PAIRS[:1])}, "body -> M", "too_short"),
        ({"input": []}, "body -> M", "too_short"),
        ({"input": examples(PAIRS) * 129}, "body -> M", "too_long"),
        ({"input": examples()[0]}, "body -> M -> input", "list_type"),
        ({"input": "text"}, "body -> M -> input", "list_type"),
        ({"input": [*examples(), "text"]}, "body -> M -> input -> 4", "example_type"),
        ({"input": [*examples(), {"text": "x"}]}, "body -> M -> input -> 4 -> label", "missing"),
        ({"input": [*examples(), {"label": "x"}]}, "body -> M -> input -> 4 -> text", "missing"),
        (
            {"input": [*examples(), {"text": "x", "label": 5}]},
            "body -> M -> input -> 4 -> label",
            "string_type",
        ),
        (
            {"input": [*examples(), {"text": "x", "label": "y" * 10_000}]},
            "body -> M -> input -> 4 -> label",
            "string_too_long",
        ),
        (
            {"input": [*examples(), {"image": "http://x/y.png", "label": "y"}]},
            "body -> M -> input -> 4",
            "unsupported_modality",
        ),
        ({"num_iters": 0}, "body -> M -> num_iters", "greater_than_equal"),
        ({"num_iters": 1001}, "body -> M -> num_iters", "less_than_equal"),
        ({"num_iters": "ten"}, "body -> M -> num_iters", "int_type"),
        ({"access": "secret"}, "body -> M -> access", "literal_error"),
    ],
)
async def test_bad_trainings_name_the_field(rig: Rig, fields: Any, field: str, kind: str) -> None:
    status, body = await refused(rig.train(**{"model": MINILM, "input": examples()} | fields))
    assert (status, body["code"]) == (422, "VALIDATION_ERROR")
    assert [(e["field"], e["type"]) for e in body["errors"]] == [(field.replace("M", MINILM), kind)]
    assert rig.access.charged == []
    assert await rig.listed() == []


@pytest.mark.parametrize(
    ("fields", "field", "kind"),
    [
        ({"classifier_id": 5}, "body -> classifier_id", "string_type"),
        ({"input": []}, "body", "too_short"),
        ({"input": ["x"] * 513}, "body", "too_long"),
        ({"input": [{"image": "http://x/y.png"}]}, "body -> input -> 0", "unsupported_modality"),
    ],
)
async def test_bad_few_shot_requests_name_the_field(rig: Rig, fields: Any, field: str, kind: str) -> None:
    status, body = await refused(rig.classify(**{"classifier_id": UNKNOWN} | fields))
    assert status == 422
    assert [(e["field"], e["type"]) for e in body["errors"]] == [(field, kind)]


async def test_one_label_is_too_few(rig: Rig) -> None:
    status, body = await refused(rig.train(model=MINILM, input=examples(PAIRS[:2])))
    assert (status, body["code"]) == (400, "INPUT_INVALID_LABELS")
    assert rig.access.charged == []


async def test_seventeen_labels_are_too_many(rig: Rig) -> None:
    many = [(f"text about {i}", f"label {i}") for i in range(17)]
    status, body = await refused(rig.train(model=MINILM, input=examples(many)))
    assert (status, body["code"]) == (400, "INPUT_LABEL_LIMIT_EXCEEDED")
    assert "17 labels provided, maximum 16" in body["detail"]
    classifier = (await rig.train(model=MINILM, input=examples(many[:16])))["classifier_id"]
    charged = list(rig.access.charged)
    status, body = await refused(rig.train(classifier_id=classifier, input=examples(many[16:])))
    assert (status, body["code"]) == (400, "INPUT_LABEL_LIMIT_EXCEEDED")
    assert rig.access.charged == charged
    await rig.train(classifier_id=classifier, input=examples(many[:3]))
    assert (await rig.listed())[0]["updated_number"] == 2


async def test_a_key_may_have_so_many_classifiers(rig: Rig) -> None:
    for _ in range(8):
        await rig.new(num_iters=1)
    charged = list(rig.access.charged)
    status, body = await refused(rig.new())
    assert (status, body["code"]) == (403, "AUTHZ_RESOURCE_LIMIT_EXCEEDED")
    assert "Current: 8, limit: 8" in body["detail"]
    assert rig.access.charged == charged
    await rig.delete((await rig.listed())[0]["classifier_id"])
    await rig.new()


async def test_creations_at_once_keep_the_limit(rig: Rig) -> None:
    outcomes = await asyncio.gather(*(rig.new(num_iters=1) for _ in range(20)), return_exceptions=True)
    assert sum(isinstance(outcome, str) for outcome in outcomes) == 8
    assert len(await rig.listed()) == 8


async def test_a_refused_charge_changes_nothing(rig: Rig) -> None:
    classifier = await rig.new()
    before = await rig.listed()
    rig.access.refuse = ServiceError(ErrorCode.AUTHZ_INSUFFICIENT_BALANCE)
    for fields in ({"classifier_id": classifier}, {"model": MINILM}):
        status, _ = await refused(rig.train(input=examples(), **fields))
        assert status == 403
    rig.access.refuse = None
    assert await rig.listed() == before
    # The lease of the failed update is gone: another one would be refused before it runs out.
    await rig.train(classifier_id=classifier, input=examples())


async def test_classifiers_are_kept_in_memory_by_version(rig: Rig) -> None:
    def counts() -> tuple[float, ...]:
        names = (
            "searchfoundation_classifier_cache_hits_total",
            "searchfoundation_classifier_cache_misses_total",
        )
        return tuple(REGISTRY.get_sample_value(name) or 0.0 for name in names)

    classifier = await rig.new()
    hits, misses = counts()
    await rig.classify(classifier_id=classifier)
    await rig.classify(classifier_id=classifier)
    assert counts() == (hits + 1, misses + 1)
    await rig.train(classifier_id=classifier, input={"text": "new", "label": "new"})
    answer = await rig.classify(classifier_id=classifier)
    assert counts() == (hits + 1, misses + 2)
    assert [each["label"] for each in answer["data"][0]["predictions"]] == ["cat", "dog", "new"]


async def test_labels_may_hold_any_text(rig: Rig) -> None:
    labels = ["", "\x00", "☃ 'quoted\"", "body -> label", "\n"]
    classifier = await rig.new(*labels)
    assert (await rig.listed())[0]["labels"] == labels
    answer = await rig.classify(classifier_id=classifier)
    assert [each["label"] for each in answer["data"][0]["predictions"]] == labels


def typed_examples(pairs: list[tuple[str, str]] = PAIRS) -> list[classify_pb2.TrainingExample]:
    return [
        classify_pb2.TrainingExample(content=common_pb2.Content(text=text), label=label)
        for text, label in pairs
    ]


async def test_typed_door(rig: Rig) -> None:
    tokens = await token_count(rig, [text for text, _ in PAIRS])
    made = await rig.typed.Train(
        classify_pb2.TrainRequest(
            model=MINILM,
            examples=typed_examples(),
            access=classify_pb2.CLASSIFIER_ACCESS_PRIVATE,
            iterations=2,
        )
    )
    assert (made.samples, made.usage.total_tokens) == (4, 2 * tokens)
    classifier = made.classifier_id
    updated = await rig.typed.UpdateClassifier(
        classify_pb2.UpdateClassifierRequest(
            classifier_id=classifier, examples=typed_examples([("a carp in the pond", "fish")])
        )
    )
    assert updated.classifier_id == classifier
    inputs = [common_pb2.Content(text="the dog barks")]
    answer = await rig.typed.Classify(classify_pb2.ClassifyRequest(classifier_id=classifier, inputs=inputs))
    rest = await rig.classify(classifier_id=classifier, input="the dog barks")
    (prediction,) = answer.classifications[0].predictions
    assert prediction.label == rest["data"][0]["prediction"] == "dog"
    assert prediction.score == pytest.approx(rest["data"][0]["score"], abs=1e-6)
    (listed,) = (await rig.typed.ListClassifiers(classify_pb2.ListClassifiersRequest())).classifiers
    got = (
        await rig.typed.GetClassifier(classify_pb2.GetClassifierRequest(classifier_id=classifier))
    ).classifier
    assert listed == got
    assert list(got.labels) == ["cat", "dog", "fish"]
    assert (got.model, got.trainings, got.uses) == (MINILM, 2, 2)
    assert got.access == classify_pb2.CLASSIFIER_ACCESS_PRIVATE
    assert got.created.ToMicroseconds() < got.updated.ToMicroseconds() < got.used.ToMicroseconds()
    await rig.typed.DeleteClassifier(classify_pb2.DeleteClassifierRequest(classifier_id=classifier))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.GetClassifier(classify_pb2.GetClassifierRequest(classifier_id=classifier))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "RESOURCE_NOT_FOUND"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"examples": typed_examples()[:1]}, "examples"),
        ({"examples": [*typed_examples(), classify_pb2.TrainingExample(label="x")]}, "examples[4].text"),
        ({"iterations": 0}, "iterations"),
        ({"access": 9}, "access"),
        ({"model": ""}, "model"),
    ],
)
async def test_typed_bad_trainings_name_the_field(rig: Rig, fields: Any, field: str) -> None:
    request = classify_pb2.TrainRequest(**{"model": MINILM, "examples": typed_examples()} | fields)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.Train(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    violations = detail(caught.value, error_details_pb2.BadRequest).field_violations
    assert [violation.field for violation in violations] == [field]
