"""Classifying as clients do it: through the gateway, with bad input, other people's classifiers and kills."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from searchfoundation.v1 import classify_pb2, classify_pb2_grpc, common_pb2

from tests.e2e.conftest import Api
from tests.gateway.client import Answer, call, get, post
from tests.servers import shared_postgres
from tests.stack import MODEL, START_SECONDS, Stack

UNKNOWN = "00000000-0000-4000-8000-000000000000"
LABELS = ["sport", "cooking", "politics"]
EXAMPLES = [
    {"text": "the cat sleeps on the sofa", "label": "cat"},
    {"text": "a kitten plays with wool", "label": "cat"},
    {"text": "the dog barks at the postman", "label": "dog"},
    {"text": "a puppy digs in the garden", "label": "dog"},
]


def delete(stack: Stack, classifier_id: str, headers: dict[str, str] | None = None) -> Answer:
    return call(stack.http_port, "DELETE", f"/v1/classifiers/{classifier_id}", headers=headers)


def test_zero_shot(api: Api) -> None:
    answer = api.classify(model=MODEL, input=["The striker scored twice."], labels=LABELS)
    assert answer.status == 200
    assert answer.headers["server-timing"].startswith("tokenize;dur=")
    (item,) = answer.json["data"]
    assert list(item) == ["object", "index", "prediction", "score", "predictions"]
    assert item["prediction"] == "sport"
    assert [each["label"] for each in item["predictions"]] == LABELS


def test_the_life_of_a_classifier(api: Api) -> None:
    made = api.train(model=MODEL, input=EXAMPLES, access="private", num_iters=3)
    assert made.status == 200, made.body
    classifier = made.json["classifier_id"]
    assert api.train(classifier_id=classifier, input={"text": "trout swim", "label": "fish"}).status == 200
    answer = api.classify(classifier_id=classifier, input="a salmon swims").json
    assert answer["data"][0]["prediction"] == "fish"
    listings = [
        call(api.stack.http_port, method, "/v1/classifiers", body, api.authorization)
        for method, body in (("GET", None), ("POST", None), ("POST", b""), ("POST", b"{}"))
    ]
    assert {answer.status for answer in listings} == {200}
    assert len({answer.body for answer in listings}) == 1
    (listed,) = listings[0].json
    assert (listed["classifier_id"], listed["labels"]) == (classifier, ["cat", "dog", "fish"])
    assert (listed["updated_number"], listed["used_number"]) == (2, 1)
    gone = delete(api.stack, classifier, api.authorization)
    assert (gone.status, gone.json["deleted"]) == (200, True)
    assert delete(api.stack, classifier, api.authorization).error() == (404, "RESOURCE_NOT_FOUND")
    assert get(api.stack.http_port, "/v1/classifiers", api.authorization).json == []


def test_wrong_methods_say_which_are_right(api: Api) -> None:
    answer = call(api.stack.http_port, "PUT", "/v1/classifiers", b"{}", api.authorization)
    assert answer.error() == (405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == "GET, HEAD, POST"
    answer = get(api.stack.http_port, f"/v1/classifiers/{UNKNOWN}", api.authorization)
    assert answer.error() == (405, "METHOD_NOT_ALLOWED")
    assert get(api.stack.http_port, "/v1/classifiers").error() == (401, "AUTH_MISSING_API_KEY")


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"labels": ["one"]}, (422, "VALIDATION_ERROR")),
        ({"labels": []}, (422, "VALIDATION_ERROR")),
        ({}, (422, "VALIDATION_ERROR")),
        ({"labels": [str(i) for i in range(513)]}, (422, "VALIDATION_ERROR")),
        ({"labels": {f"g{i}": ["a", "b"] for i in range(9)}}, (422, "VALIDATION_ERROR")),
        ({"labels": {"good": ["a", "b"], "empty": []}}, (422, "VALIDATION_ERROR")),
        ({"labels": ["a", "x" * 10_000]}, (422, "VALIDATION_ERROR")),
        ({"labels": LABELS, "input": ["x"] * 513}, (422, "VALIDATION_ERROR")),
        ({"labels": LABELS, "input": [{"image": "https://x/y.png"}]}, (422, "VALIDATION_ERROR")),
        ({"labels": LABELS, "model": "no-such-model"}, (400, "INPUT_MODEL_NOT_FOUND")),
        ({"classifier_id": UNKNOWN}, (404, "RESOURCE_NOT_FOUND")),
        ({"classifier_id": UNKNOWN, "labels": LABELS}, (404, "RESOURCE_NOT_FOUND")),
        ({"classifier_id": "cls-2025-07-15-xyz"}, (404, "RESOURCE_NOT_FOUND")),
    ],
)
def test_bad_input(api: Api, fields: dict[str, Any], outcome: tuple[int, str]) -> None:
    assert api.classify(**{"model": MODEL, **fields}).error() == outcome


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        (UNKNOWN, 404),
        ("no-uuid", 404),
        ("%2e%2e", 404),
        ("a%2Fb", 404),
        ("%E2%98%83", 404),
        ("%00", 400),  # no path may hold NUL or what is no UTF-8
        ("%98", 400),
    ],
)
def test_deleting_what_is_not_there(api: Api, wrong: str, status: int) -> None:
    assert delete(api.stack, wrong, api.authorization).error()[0] == status


def test_duplicate_labels_and_the_largest_request(api: Api) -> None:
    same = api.classify(model=MODEL, labels=["a", "b", "a"]).json["data"][0]["predictions"]
    assert [each["label"] for each in same] == ["a", "b", "a"]
    labels = [f"label {i}" for i in range(512)]
    data = api.classify(model=MODEL, input=["x"] * 512, labels=labels).json["data"]
    assert len(data) == len(data[-1]["predictions"]) == 512


def test_answers_are_those_of_the_document(api: Api) -> None:
    document = get(api.stack.http_port, "/openapi.json").json
    classifier = api.train(model=MODEL, input=EXAMPLES).json["classifier_id"]
    groups = {"topic": LABELS, "mood": ["happy", "angry"]}
    answers = {
        ("/v1/classify", "post"): [
            api.classify(model=MODEL, labels=LABELS),
            api.classify(model=MODEL, labels=groups),
            api.classify(classifier_id=classifier),
        ],
        ("/v1/train", "post"): [api.train(classifier_id=classifier, input=EXAMPLES)],
        ("/v1/classifiers", "get"): [get(api.stack.http_port, "/v1/classifiers", api.authorization)],
        ("/v1/classifiers/{classifier_id}", "delete"): [delete(api.stack, classifier, api.authorization)],
    }
    for (path, method), given in answers.items():
        schema = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
        validator = jsonschema.Draft202012Validator(schema | {"components": document["components"]})
        for answer in given:
            assert answer.status == 200
            validator.validate(answer.json)
    train = document["paths"]["/v1/train"]["post"]
    assert {"400", "403", "404", "409", "422"} <= set(train["responses"])


def test_other_peoples_classifiers(api: Api) -> None:
    stranger = {"authorization": f"Bearer {api.stack.create_key()}"}
    for access, seen in (("public", 200), ("private", 404), (None, 200)):
        classifier = api.train(model=MODEL, input=EXAMPLES, access=access).json["classifier_id"]
        body = {"classifier_id": classifier, "input": "x"}
        assert post(api.stack.http_port, body, stranger, "/v1/classify").status == seen
        further = {"classifier_id": classifier, "input": EXAMPLES}
        refused = post(api.stack.http_port, further, stranger, "/v1/train")
        assert refused.error() == (404, "RESOURCE_NOT_FOUND")
        assert delete(api.stack, classifier, stranger).error() == (404, "RESOURCE_NOT_FOUND")
        assert delete(api.stack, classifier, api.authorization).status == 200
    assert get(api.stack.http_port, "/v1/classifiers", stranger).json == []


def test_typed_callers_through_the_gateway(api: Api) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{api.stack.grpc_port}") as channel:
        stub = classify_pb2_grpc.ClassifyServiceStub(channel)
        inputs = [common_pb2.Content(text="The striker scored twice.")]
        request = classify_pb2.ClassifyRequest(model=MODEL, inputs=inputs, labels=LABELS)
        metadata = tuple(api.authorization.items())
        answer = stub.Classify(request, metadata=metadata, timeout=100)
    assert answer.classifications[0].predictions[0].label == "sport"


def test_updates_at_once_never_lose_one(api: Api) -> None:
    """Each waits for the one before, or is told to come again."""
    classifier = api.train(model=MODEL, input=EXAMPLES).json["classifier_id"]

    def update(number: int) -> int:
        example = {"text": f"about {number}", "label": f"label {number % 8}"}
        return api.train(classifier_id=classifier, input=example, num_iters=1).status

    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(update, range(24)))
    assert set(outcomes) <= {200, 409}
    (listed,) = get(api.stack.http_port, "/v1/classifiers", api.authorization).json
    assert listed["updated_number"] == 1 + outcomes.count(200)
    delete(api.stack, classifier, api.authorization)


def test_a_locked_database(stack: Stack) -> None:
    stack.settings = {"SF_AUTH": "false", "SF_DATABASE_TIMEOUT_SECONDS": "0.3"}
    stack.serve("classify")
    stack.gateway()
    body = {"model": MODEL, "input": EXAMPLES}
    classifier = post(stack.http_port, body, path="/v1/train").json["classifier_id"]
    with closing(sqlite3.connect(database_file(stack), isolation_level=None)) as rival:
        rival.execute("BEGIN IMMEDIATE")
        for fields in (body, {"classifier_id": classifier, "input": EXAMPLES}):
            refused = post(stack.http_port, fields, path="/v1/train")
            assert refused.error() == (503, "SERVICE_UNAVAILABLE")
            assert float(refused.headers["retry-after"]) > 0
        zero_shot = {"model": MODEL, "input": "x", "labels": LABELS}
        assert post(stack.http_port, zero_shot, path="/v1/classify").status == 200
        rival.execute("ROLLBACK")
    (listed,) = get(stack.http_port, "/v1/classifiers").json
    assert (listed["classifier_id"], listed["updated_number"]) == (classifier, 1)
    assert (
        post(stack.http_port, {"classifier_id": classifier, "input": "x"}, path="/v1/classify").status == 200
    )
    assert post(stack.http_port, body, path="/v1/train").status == 200


@pytest.mark.parametrize(
    ("kind", "trainings"),
    [("sqlite", 12), ("postgresql", 12)]
    + [pytest.param(kind, 50, marks=pytest.mark.soak) for kind in ("sqlite", "postgresql")],
)
def test_kills_during_trainings(stack: Stack, kind: str, trainings: int) -> None:
    """Whatever was acknowledged is there and usable; nothing that is there is broken."""
    stack.settings = {"SF_AUTH": "false", "SF_MAX_CLASSIFIERS": "1000"}
    if kind == "postgresql":
        stack.settings = {**stack.settings, "SF_DATABASE_URL": shared_postgres().new_database()}
    services = stack.serve("classify")
    stack.gateway()
    updated = post(stack.http_port, {"model": MODEL, "input": EXAMPLES}, path="/v1/train").json
    acknowledged: list[str] = [updated["classifier_id"]]
    updates = 0
    counting = threading.Lock()

    def train(number: int) -> None:
        nonlocal updates
        body: dict[str, Any] = {"input": EXAMPLES * 8, "num_iters": 50}
        if number % 5 == 0:
            body["classifier_id"] = updated["classifier_id"]
        else:
            body["model"] = MODEL
        until = time.monotonic() + START_SECONDS
        while (answer := post(stack.http_port, body, path="/v1/train")).status != 200:
            assert answer.status in (409, 502, 503), answer.body
            assert time.monotonic() < until, "was never trained"
            time.sleep(0.1)
        with counting:
            if "classifier_id" in body:
                updates += 1
            else:
                acknowledged.append(answer.json["classifier_id"])

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(train, number) for number in range(trainings)]
        for part in (trainings // 5, trainings // 2):
            while sum(each.done() for each in running) < part:
                time.sleep(0.005)
            services.command.signal(signal.SIGKILL)
            services.command.wait()
            Path(services.environment["SF_PORTS_FILE"]).unlink(missing_ok=True)
            services.restart()
        for each in running:
            each.result()
    listed = {each["classifier_id"]: each for each in get(stack.http_port, "/v1/classifiers").json}
    assert set(acknowledged) <= set(listed)
    assert listed[updated["classifier_id"]]["updated_number"] >= 1 + updates
    for classifier in listed:
        body = {"classifier_id": classifier, "input": ["the kitten sleeps", "the dog barks"]}
        answer = post(stack.http_port, body, path="/v1/classify")
        assert [item["prediction"] for item in answer.json["data"]] == ["cat", "dog"]


def test_two_pools_find_each_classifier(tmp_path: Path) -> None:
    """Requests with a classifier's id name no model; its id says which pool has it."""
    aliases = json.dumps({"house-model": MODEL})
    with Stack(tmp_path, {"SF_AUTH": "false", "SF_MODEL_ALIASES": aliases}) as stack:
        stack.serve("classify")
        stack.serve("classify", models=("house-model",))
        stack.gateway()
        for model in (MODEL, "house-model"):
            made = post(stack.http_port, {"model": model, "input": EXAMPLES}, path="/v1/train").json
            classifier = made["classifier_id"]
            for form in (classifier, classifier.upper()):
                body = {"classifier_id": form, "input": "a kitten"}
                answer = post(stack.http_port, body, path="/v1/classify")
                assert answer.status == 200, answer.body
                # A model named beside it does not lead astray.
                body["model"] = "house-model" if model == MODEL else MODEL
                assert post(stack.http_port, body, path="/v1/classify").status == 200
            further = {"classifier_id": classifier, "input": EXAMPLES}
            assert post(stack.http_port, further, path="/v1/train").status == 200
        listed = get(stack.http_port, "/v1/classifiers").json
        assert [each["model"] for each in listed] == [MODEL, "house-model"]
        assert not re.match(listed[0]["classifier_id"][:8], listed[1]["classifier_id"])


def database_file(stack: Stack) -> Path:
    return Path(stack.environment["SF_DATA_DIR"]) / "search-foundation.sqlite3"
