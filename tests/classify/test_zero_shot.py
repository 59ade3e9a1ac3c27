"""Zero-shot classification through both doors, over the real server, engine and model."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from prometheus_client import REGISTRY
from searchfoundation.v1 import classify_pb2, common_pb2

from services.core.call import Call
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import EmbedOptions, finish
from tests.classify.conftest import Rig, refused
from tests.rig import ALIAS, MINILM, detail

pytestmark = pytest.mark.asyncio(loop_scope="module")

LABELS = ["sport", "cooking", "politics"]
TEXTS = ["The striker scored twice.", "Fry the onions in butter.", "Parliament passed the budget."]


async def unit_vectors(rig: Rig, texts: list[str]) -> np.ndarray:
    embedded = await rig.engine.embedder(MINILM).embed(texts, EmbedOptions(), Call("test"))
    return finish(embedded.vectors)


async def token_count(rig: Rig, texts: list[str]) -> int:
    embedded = await rig.engine.embedder(MINILM).embed(texts, EmbedOptions(truncate=True), Call("test"))
    return sum(embedded.token_counts)


async def ask(rig: Rig, **fields: Any) -> dict[str, Any]:
    return await rig.classify(**{"model": MINILM, "input": TEXTS, "labels": LABELS} | fields)


def cache_count(kind: str, model: str = MINILM) -> float:
    name = f"searchfoundation_label_cache_{kind}_total"
    return REGISTRY.get_sample_value(name, {"model": model}) or 0.0


async def test_answers_softmax_of_cosines_in_label_order(rig: Rig) -> None:
    answer = await ask(rig)
    cosines = await unit_vectors(rig, TEXTS) @ (await unit_vectors(rig, LABELS)).T
    expected = np.exp(cosines) / np.exp(cosines).sum(axis=1, keepdims=True)
    assert set(answer) == {"usage", "data"}
    for row, item in enumerate(answer["data"]):
        assert item["object"] == "classification"
        assert item["index"] == row
        assert [each["label"] for each in item["predictions"]] == LABELS
        scores = [each["score"] for each in item["predictions"]]
        assert scores == pytest.approx(expected[row], abs=1e-5)
        assert sum(scores) == pytest.approx(1.0, abs=1e-7)
        assert item["prediction"] == LABELS[row]
        assert item["score"] == max(scores)


async def test_bills_inputs_and_labels_once_before_inference(rig: Rig) -> None:
    labels = ["first unseen label", "second unseen label"]
    tokens = await token_count(rig, TEXTS) + await token_count(rig, labels)
    fresh = await ask(rig, labels=labels)
    cached = await ask(rig, labels=labels)
    assert fresh["usage"] == cached["usage"] == {"total_tokens": tokens}
    assert rig.access.charged == [tokens, tokens]


async def test_label_vectors_are_remembered_between_calls(rig: Rig) -> None:
    labels = ["remembered one", "remembered two", "remembered three"]
    hits, misses = cache_count("hits"), cache_count("misses")
    first = await ask(rig, labels=labels)
    assert (cache_count("hits") - hits, cache_count("misses") - misses) == (0, 3)
    second = await ask(rig, labels=[*labels, "another"])
    assert (cache_count("hits") - hits, cache_count("misses") - misses) == (3, 4)
    assert [p["label"] for p in second["data"][0]["predictions"]] == [*labels, "another"]
    assert await ask(rig, labels=labels) == first


async def test_an_alias_shares_the_labels_of_its_model(rig: Rig) -> None:
    labels = ["shared one", "shared two"]
    await ask(rig, labels=labels)
    hits, misses = cache_count("hits", ALIAS), cache_count("misses", ALIAS)
    await ask(rig, labels=labels, model=ALIAS)
    assert (cache_count("hits", ALIAS), cache_count("misses", ALIAS)) == (hits + 2, misses)


async def test_labels_run_once_per_call_whatever_the_number_of_inputs(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    model = rig.engine.embedder(MINILM)
    encode = type(model).encode

    async def spy(self: Any, groups: Any, truncate: bool, call: Call) -> Any:
        seen.extend(text for group in groups for text in group.contents)
        return await encode(self, groups, truncate, call)

    monkeypatch.setattr(type(model), "encode", spy)
    await ask(rig, input=["a text"] * 50, labels=["run once", "run once too", "run once"])
    assert seen.count("run once") == 1
    assert seen.count("run once too") == 1
    assert len(seen) == 52


async def test_duplicate_labels_are_kept_and_billed(rig: Rig) -> None:
    labels = ["unheard duplicate", "other", "unheard duplicate"]
    answer = await ask(rig, input="other things", labels=labels)
    scores = [each["score"] for each in answer["data"][0]["predictions"]]
    assert [each["label"] for each in answer["data"][0]["predictions"]] == labels
    assert scores[0] == pytest.approx(scores[2], abs=1e-6)
    expected = await token_count(rig, ["other things"]) + await token_count(rig, labels)
    assert answer["usage"]["total_tokens"] == expected


async def test_equal_scores_choose_the_first_label(rig: Rig) -> None:
    answer = await ask(rig, input="same", labels=["same", "same"])
    assert answer["data"][0]["predictions"][0]["score"] == pytest.approx(0.5)
    assert answer["data"][0]["prediction"] == "same"


async def test_groups_are_answered_each_by_itself(rig: Rig) -> None:
    groups = {"topic": LABELS, "mood": ["happy", "angry"]}
    answer = await ask(rig, labels=groups)
    plain = await ask(rig, labels=LABELS)
    for item, alone in zip(answer["data"], plain["data"], strict=True):
        assert list(item["prediction"]) == list(item["score"]) == list(item["predictions"]) == list(groups)
        assert item["prediction"]["topic"] == alone["prediction"]
        for name, labels in groups.items():
            scores = [each["score"] for each in item["predictions"][name]]
            assert [each["label"] for each in item["predictions"][name]] == labels
            assert sum(scores) == pytest.approx(1.0, abs=1e-7)
            assert item["score"][name] == max(scores)
    assert answer["data"][0]["score"]["topic"] == pytest.approx(plain["data"][0]["score"], abs=1e-6)


async def test_one_group_is_still_answered_as_groups(rig: Rig) -> None:
    answer = await ask(rig, labels={"only": LABELS})
    assert answer["data"][0]["prediction"] == {"only": "sport"}


@pytest.mark.parametrize("given", ["a text", {"text": "a text"}, ["a text"], [{"text": "a text"}]])
async def test_every_form_of_input(rig: Rig, given: Any) -> None:
    assert await ask(rig, input=given) == await ask(rig, input="a text")
    assert len((await ask(rig, input=given))["data"]) == 1


async def test_the_largest_request(rig: Rig) -> None:
    labels = [f"label number {i}" for i in range(512)]
    answer = await ask(rig, input=[f"text {i}" for i in range(512)], labels=labels)
    assert len(answer["data"]) == 512
    assert all(len(item["predictions"]) == 512 for item in answer["data"])
    assert sum(each["score"] for each in answer["data"][-1]["predictions"]) == pytest.approx(1.0, abs=1e-5)


async def test_long_texts_and_labels_are_cut(rig: Rig) -> None:
    answer = await ask(rig, input="word " * 5000, labels=["word " * 400, "other"])
    assert answer["usage"]["total_tokens"] <= 512 + 402 + 3
    assert math.isfinite(answer["data"][0]["score"])


@pytest.mark.parametrize(
    ("fields", "field", "kind"),
    [
        ({"labels": ["one"]}, "body -> M -> labels", "too_short"),
        ({"labels": []}, "body -> M -> labels", "too_short"),
        ({"labels": None}, "body -> M -> labels", "labels_type"),
        ({"labels": "one"}, "body -> M -> labels", "labels_type"),
        ({"labels": [f"l{i}" for i in range(513)]}, "body -> M -> labels", "too_long"),
        ({"labels": ["a", 5]}, "body -> M -> labels -> 1", "string_type"),
        ({"labels": ["a", "x" * 10_000]}, "body -> M -> labels -> 1", "string_too_long"),
        ({"labels": {}}, "body -> M -> labels", "too_short"),
        ({"labels": {f"g{i}": ["a", "b"] for i in range(9)}}, "body -> M -> labels", "too_long"),
        ({"labels": {"good": ["a", "b"], "bad": []}}, "body -> M -> labels -> bad", "too_short"),
        ({"labels": {"bad": ["a"]}}, "body -> M -> labels -> bad", "too_short"),
        ({"labels": {"bad": "ab"}}, "body -> M -> labels -> bad", "list_type"),
        ({"labels": {"bad": ["a", None]}}, "body -> M -> labels -> bad -> 1", "string_type"),
        ({"labels": {"bad": [str(i) for i in range(65)]}}, "body -> M -> labels -> bad", "too_long"),
        ({"input": ["x"] * 513}, "body -> M", "too_long"),
        ({"input": []}, "body -> M", "too_short"),
        ({"input": ["x", 5]}, "body -> M -> input -> 1", "text_type"),
        ({"input": [{"image": "http://x/y.png"}]}, "body -> M -> input -> 0", "unsupported_modality"),
        ({"input": [{"text": None}]}, "body -> M -> input -> 0 -> text", "string_type"),
        ({"model": 5}, "body -> model", "string_type"),
    ],
)
async def test_bad_requests_name_the_field(rig: Rig, fields: Any, field: str, kind: str) -> None:
    status, body = await refused(ask(rig, **fields))
    assert (status, body["code"]) == (422, "VALIDATION_ERROR")
    assert [(e["field"], e["type"]) for e in body["errors"]] == [(field.replace("M", MINILM), kind)]
    assert rig.access.charged == []


async def test_missing_labels_and_model(rig: Rig) -> None:
    status, body = await refused(rig.classify(model=MINILM))
    assert (status, body["errors"][0]["field"]) == (422, f"body -> {MINILM} -> labels")
    status, body = await refused(rig.classify(labels=LABELS, classifier_id=None))
    assert (status, body["errors"][0]["field"]) == (422, "body -> model")


async def test_unknown_model(rig: Rig) -> None:
    status, body = await refused(ask(rig, model="jina-embeddings-v3"))
    assert (status, body["code"]) == (400, "INPUT_MODEL_NOT_FOUND")


async def test_an_answer_that_would_be_huge_is_refused(rig: Rig) -> None:
    labels = [f"{i} {'x' * 2000}" for i in range(512)]
    status, body = await refused(ask(rig, input=["y"] * 512, labels=labels))
    assert (status, body["code"]) == (400, "INPUT_INVALID")
    assert "512 inputs" in body["detail"]


async def test_a_refused_charge_embeds_nothing_and_remembers_nothing(rig: Rig) -> None:
    labels = ["never paid one", "never paid two"]
    rig.access.refuse = ServiceError(ErrorCode.AUTHZ_INSUFFICIENT_BALANCE)
    status, body = await refused(ask(rig, labels=labels))
    assert (status, body["code"]) == (403, "AUTHZ_INSUFFICIENT_BALANCE")
    rig.access.refuse = None
    misses = cache_count("misses")
    await ask(rig, labels=labels)
    assert cache_count("misses") - misses == 2


async def test_concurrent_calls_with_other_labels(rig: Rig) -> None:
    sets = [[f"set {i} label {j}" for j in range(5)] for i in range(16)]
    alone = [await ask(rig, labels=labels) for labels in sets[:4]]
    together = await asyncio.gather(*(ask(rig, labels=labels) for labels in sets))
    for one, other in zip(alone, together[:4], strict=True):
        for left, right in zip(one["data"], other["data"], strict=True):
            assert left["prediction"] == right["prediction"]
            assert left["score"] == pytest.approx(right["score"], abs=1e-5)


def typed_request(**fields: Any) -> classify_pb2.ClassifyRequest:
    inputs = [common_pb2.Content(text=text) for text in fields.pop("inputs", TEXTS)]
    return classify_pb2.ClassifyRequest(**{"model": MINILM, "inputs": inputs} | fields)


async def test_typed_door_says_the_same(rig: Rig) -> None:
    typed = await rig.typed.Classify(typed_request(labels=LABELS))
    rest = await ask(rig)
    assert typed.model == MINILM
    assert typed.usage.total_tokens == rest["usage"]["total_tokens"]
    assert typed.timings.inference.ToNanoseconds() > 0
    for ours, theirs in zip(typed.classifications, rest["data"], strict=True):
        (prediction,) = ours.predictions
        assert (ours.index, prediction.group, prediction.label) == (theirs["index"], "", theirs["prediction"])
        assert prediction.score == pytest.approx(theirs["score"], abs=1e-6)
        assert [(e.label, e.score) for e in prediction.labels] == [
            (e["label"], pytest.approx(e["score"], abs=1e-6)) for e in theirs["predictions"]
        ]


async def test_typed_groups(rig: Rig) -> None:
    groups = [
        classify_pb2.LabelGroup(name="topic", labels=LABELS),
        classify_pb2.LabelGroup(name="mood", labels=["happy", "angry"]),
    ]
    answer = await rig.typed.Classify(typed_request(groups=groups))
    assert [p.group for p in answer.classifications[0].predictions] == ["topic", "mood"]
    assert answer.classifications[0].predictions[0].label == "sport"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"labels": ["one"]}, "labels"),
        ({}, "labels"),
        ({"labels": ["a", "x" * 10_000]}, "labels[1]"),
        ({"groups": [classify_pb2.LabelGroup(name="g", labels=["a"])]}, "groups.g"),
        ({"groups": [classify_pb2.LabelGroup(name="g", labels=["a", "b"])] * 2}, "groups"),
        ({"groups": [classify_pb2.LabelGroup(labels=["a", "b"])], "labels": ["a", "b"]}, "groups"),
        ({"labels": LABELS, "inputs": []}, "inputs"),
        ({"labels": LABELS, "inputs": ["x"] * 513}, "inputs"),
    ],
)
async def test_typed_bad_requests_name_the_field(rig: Rig, fields: Any, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.Classify(typed_request(**fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    violations = detail(caught.value, error_details_pb2.BadRequest).field_violations
    assert [v.field for v in violations] == [field]
