"""Classifiers in both databases: owners, leases, versions, counters, and a database that is away."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from sqlalchemy import text

import services.classify.lease as lease_module
from services.classify.few_shot import ClassifierLimits, FewShot
from services.classify.learner import LabelWeights
from services.classify.lease import Leases
from services.classify.schema import Access, FewShotRequest, TrainRequest, UpdateRequest
from services.classify.table import CLASSIFIERS, ClassifierTable, Taken
from services.core.call import Call
from services.core.catalog import Catalog
from services.core.errors import ErrorCode, ServiceError
from services.core.inference import Engine
from services.core.settings import Settings
from services.core.storage import Database
from tests.rig import MINILM, settings
from tests.servers import PostgresServer, remove, shared_postgres, start_postgres

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXTS = ["a cat", "a kitten", "a dog", "a puppy"]
LABELS = ["cat", "cat", "dog", "dog"]
LIMITS = ClassifierLimits(classifiers=5, labels=4, of_tier={})


def ann() -> Call:
    return Call("test", key_id="key_ann")


def bob() -> Call:
    return Call("test", key_id="key_bob")


def train_request(access: Access = Access.PRIVATE) -> TrainRequest:
    return TrainRequest(MINILM, TEXTS, LABELS, access, 2)


def update_request(classifier_id: str, label: str = "cat") -> UpdateRequest:
    return UpdateRequest(classifier_id, ["another text"], [label], 2)


async def refusal(work: Any) -> ErrorCode:
    with pytest.raises(ServiceError) as caught:
        await work
    return caught.value.code


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    engine = await Engine.start(settings(), Catalog.load())
    yield engine
    await engine.stop(5.0)


@pytest.fixture(params=["sqlite", "postgresql"])
def chosen(request: pytest.FixtureRequest, tmp_path: Any) -> Settings:
    url = shared_postgres().new_database() if request.param == "postgresql" else None
    return settings(data_dir=tmp_path / "data", database_url=url, database_timeout_seconds=2.0)


@pytest_asyncio.fixture(loop_scope="module")
async def database(chosen: Settings) -> AsyncIterator[Database]:
    database = await Database.open(chosen, CLASSIFIERS)
    yield database
    await database.close()


@pytest_asyncio.fixture(loop_scope="module")
async def executor() -> AsyncIterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest_asyncio.fixture(loop_scope="module")
async def few_shot(engine: Engine, database: Database, executor: ThreadPoolExecutor) -> FewShot:
    return FewShot(engine, ClassifierTable(database), executor, LIMITS)


@pytest_asyncio.fixture(loop_scope="module")
async def other_process(
    engine: Engine, chosen: Settings, executor: ThreadPoolExecutor
) -> AsyncIterator[FewShot]:
    """Another process on the same database, as far as the database can tell."""
    database = await Database.open(chosen, CLASSIFIERS)
    yield FewShot(engine, ClassifierTable(database), executor, LIMITS)
    await database.close()


@pytest.fixture
def gate(few_shot: FewShot, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Makes trainings of ``few_shot`` set the first event when they learn, and wait for the second."""
    began, go = asyncio.Event(), asyncio.Event()
    learn = few_shot._learn

    async def wait_first(*arguments: Any) -> LabelWeights:
        began.set()
        await go.wait()
        return await learn(*arguments)

    monkeypatch.setattr(few_shot, "_learn", wait_first)
    return began, go


async def test_only_the_owner_updates_and_deletes(few_shot: FewShot) -> None:
    for access in Access:
        made = (await few_shot.train(train_request(access), ann())).classifier_id
        for work in (few_shot.update(update_request(made), bob()), few_shot.delete(made, bob())):
            assert await refusal(work) is ErrorCode.RESOURCE_NOT_FOUND
        await few_shot.update(update_request(made), ann())
        await few_shot.delete(made, ann())


async def test_private_classifiers_are_for_their_owner(few_shot: FewShot) -> None:
    public = (await few_shot.train(train_request(Access.PUBLIC), ann())).classifier_id
    private = (await few_shot.train(train_request(Access.PRIVATE), ann())).classifier_id
    charged: list[int] = []

    async def charge(tokens: int) -> None:
        charged.append(tokens)

    caller = bob()
    caller.charge = charge
    answer = await few_shot.classify(FewShotRequest(public, ["a cat"]), caller)
    assert charged == [answer.usage.total]
    assert (await few_shot.get(public, bob())).id == public
    foreign = FewShotRequest(private, ["a cat"])
    assert await refusal(few_shot.classify(foreign, bob())) is ErrorCode.RESOURCE_NOT_FOUND
    assert await refusal(few_shot.get(private, bob())) is ErrorCode.RESOURCE_NOT_FOUND
    # Also when the owner has just brought it into memory.
    await few_shot.classify(foreign, ann())
    assert await refusal(few_shot.classify(foreign, bob())) is ErrorCode.RESOURCE_NOT_FOUND
    assert await few_shot.list(bob()) == []
    assert len(await few_shot.list(ann())) == 2


async def test_creations_of_two_processes_keep_the_limit(few_shot: FewShot, other_process: FewShot) -> None:
    works = [each.train(train_request(), ann()) for each in (few_shot, other_process) for _ in range(6)]
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, ServiceError)]
    assert len(outcomes) - len(refused) == LIMITS.classifiers
    assert {each.code for each in refused} == {ErrorCode.AUTHZ_RESOURCE_LIMIT_EXCEEDED}
    assert len(await few_shot.list(ann())) == LIMITS.classifiers
    await other_process.train(train_request(), bob())


async def test_the_second_of_two_updates_is_refused(
    few_shot: FewShot,
    other_process: FewShot,
    gate: tuple[asyncio.Event, asyncio.Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease_module, "WAIT_SECONDS", 0.2)
    began, go = gate
    made = (await other_process.train(train_request(), ann())).classifier_id
    first = asyncio.create_task(few_shot.update(update_request(made, "first"), ann()))
    await began.wait()
    for each in (few_shot, other_process):
        assert await refusal(each.update(update_request(made), ann())) is ErrorCode.CONFLICT_RESOURCE_BUSY
    # Classifying goes on, with the version before.
    answer = await other_process.classify(FewShotRequest(made, ["x"]), ann())
    assert answer.groups[0].labels == ("cat", "dog")
    go.set()
    await first
    answer = await other_process.classify(FewShotRequest(made, ["x"]), ann())
    assert answer.groups[0].labels == ("cat", "dog", "first")


async def test_the_second_of_two_updates_waits_a_little(
    few_shot: FewShot, other_process: FewShot, gate: tuple[asyncio.Event, asyncio.Event]
) -> None:
    began, go = gate
    made = (await other_process.train(train_request(), ann())).classifier_id
    first = asyncio.create_task(few_shot.update(update_request(made, "first"), ann()))
    await began.wait()
    second = asyncio.create_task(other_process.update(update_request(made, "second"), ann()))
    await asyncio.sleep(0.1)
    assert not second.done()
    go.set()
    await asyncio.gather(first, second)
    (listed,) = await few_shot.list(ann())
    assert listed.labels == ("cat", "dog", "first", "second")
    assert listed.version == 3


async def test_a_lease_ends_with_a_holder_who_died(
    few_shot: FewShot, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (await few_shot.train(train_request(), ann())).classifier_id
    table = ClassifierTable(database)
    assert await table.take(made, "key_ann", "died", 0.3) is Taken.YES
    monkeypatch.setattr(lease_module, "WAIT_SECONDS", 10.0)
    await few_shot.update(update_request(made, "later"), ann())
    # Whoever comes back after losing the lease cannot replace what was made meanwhile.
    matrix = np.zeros((3, 384), np.float32)
    assert not await table.replace(made, "died", 1, ("cat", "dog"), matrix)
    assert not await table.renew(made, "died", 1.0)
    assert (await few_shot.get(made, ann())).labels == ("cat", "dog", "later")


async def test_a_lease_is_renewed_while_it_is_held(database: Database, few_shot: FewShot) -> None:
    made = (await few_shot.train(train_request(), ann())).classifier_id
    table = ClassifierTable(database)
    with pytest.MonkeyPatch.context() as patch:
        # Long enough for a renewal that is late on a machine that does much else.
        patch.setattr(lease_module, "LEASE_SECONDS", 2.0)
        patch.setattr(lease_module, "_RENEW_SECONDS", 0.1)
        async with Leases(table).hold(made, "key_ann"):
            await asyncio.sleep(2.5)
            assert await table.take(made, "key_ann", "other", 1.0) is Taken.BUSY
    assert await table.take(made, "key_ann", "other", 1.0) is Taken.YES


async def test_a_cancelled_update_leaves_no_lease_and_no_change(
    few_shot: FewShot, database: Database, gate: tuple[asyncio.Event, asyncio.Event]
) -> None:
    began, go = gate
    go.set()
    made = (await few_shot.train(train_request(), ann())).classifier_id
    began.clear()
    go.clear()
    update = asyncio.create_task(few_shot.update(update_request(made, "new"), ann()))
    await began.wait()
    update.cancel()
    with pytest.raises(asyncio.CancelledError):
        await update
    assert await ClassifierTable(database).take(made, "key_ann", "next", 1.0) is Taken.YES
    assert (await few_shot.get(made, ann())).labels == ("cat", "dog")


async def test_deleting_wins_over_an_update(
    few_shot: FewShot, other_process: FewShot, gate: tuple[asyncio.Event, asyncio.Event]
) -> None:
    began, go = gate
    made = (await other_process.train(train_request(), ann())).classifier_id
    update = asyncio.create_task(few_shot.update(update_request(made), ann()))
    await began.wait()
    await other_process.delete(made, ann())
    go.set()
    assert await refusal(update) is ErrorCode.RESOURCE_NOT_FOUND
    assert await few_shot.list(ann()) == []


async def test_uses_are_written_in_batches_and_never_lost(
    few_shot: FewShot, other_process: FewShot, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (await few_shot.train(train_request(), ann())).classifier_id
    request = FewShotRequest(made, ["x"])
    for each in (few_shot, few_shot, other_process):
        await each.classify(request, ann())
    add = few_shot._table.add_uses

    async def fail(_: Any) -> None:
        raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE)

    monkeypatch.setattr(few_shot._table, "add_uses", fail)
    assert await refusal(few_shot.uses.flush()) is ErrorCode.SERVICE_UNAVAILABLE
    await few_shot.classify(request, ann())
    monkeypatch.setattr(few_shot._table, "add_uses", add)
    few_shot.uses.start()
    await few_shot.uses.stop()
    assert (await other_process.get(made, ann())).used_number == 4


async def test_a_name_that_came_to_mean_another_model(few_shot: FewShot, database: Database) -> None:
    made = (await few_shot.train(train_request(), ann())).classifier_id
    async with database.write() as connection:
        narrow = text("UPDATE classifiers SET width = 3, weights = :weights")
        await connection.execute(narrow, {"weights": np.zeros((3, 3), "<f4").tobytes()})
    assert await refusal(few_shot.classify(FewShotRequest(made, ["x"]), ann())) is ErrorCode.INPUT_INVALID
    assert await refusal(few_shot.update(update_request(made), ann())) is ErrorCode.INPUT_INVALID


async def test_a_model_that_is_served_elsewhere(few_shot: FewShot, database: Database) -> None:
    made = (await few_shot.train(train_request(), ann())).classifier_id
    async with database.write() as connection:
        await connection.execute(text("UPDATE classifiers SET model = 'jina-embeddings-v3'"))
    work = few_shot.classify(FewShotRequest(made, ["x"]), ann())
    assert await refusal(work) is ErrorCode.INPUT_MODEL_NOT_FOUND


async def test_a_locked_sqlite_file(engine: Engine, executor: ThreadPoolExecutor, tmp_path: Any) -> None:
    chosen = settings(data_dir=tmp_path, database_timeout_seconds=0.3)
    database = await Database.open(chosen, CLASSIFIERS)
    few_shot = FewShot(engine, ClassifierTable(database), executor, LIMITS)
    made = (await few_shot.train(train_request(), ann())).classifier_id
    with closing(sqlite3.connect(tmp_path / "search-foundation.sqlite3", isolation_level=None)) as rival:
        rival.execute("BEGIN IMMEDIATE")
        works = (few_shot.train(train_request(), ann()), few_shot.update(update_request(made), ann()))
        for work in (*works, few_shot.delete(made, ann())):
            assert await refusal(work) is ErrorCode.SERVICE_UNAVAILABLE
        # Readers do not mind, and the count of uses waits.
        await few_shot.classify(FewShotRequest(made, ["x"]), ann())
        rival.execute("ROLLBACK")
    (listed,) = await few_shot.list(ann())
    assert (listed.labels, listed.version, listed.used_number) == (("cat", "dog"), 1, 1)
    await few_shot.update(update_request(made), ann())
    await database.close()


async def test_a_sqlite_file_that_vanishes_and_returns(
    engine: Engine, executor: ThreadPoolExecutor, tmp_path: Any
) -> None:
    chosen = settings(data_dir=tmp_path / "data", database_timeout_seconds=0.5)
    database = await Database.open(chosen, CLASSIFIERS)
    few_shot = FewShot(engine, ClassifierTable(database), executor, LIMITS)
    made = (await few_shot.train(train_request(), ann())).classifier_id
    shutil.move(tmp_path / "data", tmp_path / "away")
    for work in (
        few_shot.classify(FewShotRequest(made, ["x"]), ann()),
        few_shot.train(train_request(), ann()),
        few_shot.list(ann()),
    ):
        assert await refusal(work) is ErrorCode.SERVICE_UNAVAILABLE
    shutil.move(tmp_path / "away", tmp_path / "data")
    await few_shot.classify(FewShotRequest(made, ["x"]), ann())
    await few_shot.update(update_request(made, "later"), ann())
    assert [each.labels for each in await few_shot.list(ann())] == [("cat", "dog", "later")]
    await database.close()


async def test_postgresql_that_stops_in_the_middle_of_an_update(
    engine: Engine, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 1.0)
    server: PostgresServer = start_postgres()
    try:
        database = await Database.open(settings(database_url=server.url()), CLASSIFIERS)
        few_shot = FewShot(engine, ClassifierTable(database), executor, LIMITS)
        made = (await few_shot.train(train_request(), ann())).classifier_id
        learn = few_shot._learn

        async def stop_first(*arguments: Any) -> LabelWeights:
            await asyncio.to_thread(server.stop)
            return await learn(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(few_shot, "_learn", stop_first)
            work = few_shot.update(update_request(made, "lost"), ann())
            assert await refusal(work) is ErrorCode.SERVICE_UNAVAILABLE
        await asyncio.to_thread(server.start)
        await asyncio.sleep(1.0)
        assert (await few_shot.get(made, ann())).labels == ("cat", "dog")
        await few_shot.update(update_request(made, "found"), ann())
        assert (await few_shot.get(made, ann())).labels == ("cat", "dog", "found")
        await database.close()
    finally:
        remove(server)
