"""What the scheduler promises: order, shares, bounds; nothing lost, nothing run twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.call import Priority
from services.core.inference.jobs import AnyJob, AnyLane, Batch, Job, Lane
from services.core.inference.scheduler import QueueFullError, Scheduler


def lane(name: str = "model", **rules: object) -> AnyLane:
    return Lane(name, run=lambda payloads: payloads, **rules)  # type: ignore[arg-type]


class _CountingLane(Lane[int, int]):
    """Counts how often a cut asks for its rules."""

    asked = 0

    def __getattribute__(self, name: str) -> object:
        if name == "max_length_ratio":
            self.asked += 1
        return object.__getattribute__(self, name)


def job(on: AnyLane, lengths: Sequence[int], **who: object) -> AnyJob:
    return Job(on, list(range(len(lengths))), lengths, **who)  # type: ignore[arg-type]


def cut_all(scheduler: Scheduler, workers: int = 1) -> list[Batch]:
    batches: list[Batch] = []
    while (batch := scheduler.next_batch(workers=workers)) is not None:
        batches.append(batch)
    return batches


def _drained(scheduler: Scheduler, only: Priority) -> list[Batch]:
    batches: list[Batch] = []
    while (batch := scheduler.next_batch(only=only)) is not None:
        batches.append(batch)
    return batches


def owners(batch: Batch) -> set[str]:
    return {job.key_id for job, _ in batch.items}


class TestCutting:
    def test_holds_the_token_budget_and_takes_a_longer_item_alone(self) -> None:
        scheduler = Scheduler(10_000)
        scheduler.submit(job(lane(max_tokens=100), [60, 30, 250, 50, 40]))
        assert [[place for _, place in b.items] for b in cut_all(scheduler)] == [[2], [0], [3, 4], [1]]

    @pytest.mark.parametrize("tenants", [1, 3, 1_000])
    def test_fills_a_batch_from_however_many_calls_of_one_text(self, tenants: int) -> None:
        scheduler, one, other = Scheduler(1_000_000), lane("one", max_tokens=8_000), lane("other")
        for i in range(1_000):
            scheduler.submit(job(one, [16], key_id=str(i % tenants)))
            scheduler.submit(job(other, [16], key_id=str(i % tenants)))
        batch = scheduler.next_batch()
        assert batch is not None
        # With a tenant for each call, those who come next are not passed over for the sake of a full batch.
        assert len(batch.items) == 400
        assert {job.lane for job, _ in batch.items} == {one}

    def test_what_a_cut_looks_at_does_not_grow_with_the_queue(self) -> None:
        looked_at: list[int] = []
        for waiting in (1_000, 10_000):
            scheduler, model = Scheduler(10_000_000), _CountingLane("model", lambda payloads: payloads)
            model.max_tokens, model.max_length_ratio = 256, 2.0
            for i in range(waiting):
                scheduler.submit(job(model, [16 if i % 2 else 100], key_id=str(i % 500)))
            model.asked = 0
            assert scheduler.next_batch() is not None
            looked_at.append(model.asked)
        assert max(looked_at) < 100

    def test_keeps_unlike_lengths_apart(self) -> None:
        scheduler = Scheduler(10_000)
        scheduler.submit(job(lane(max_length_ratio=2.0), [10, 100, 11, 90, 20]))
        assert [b.tokens for b in cut_all(scheduler)] == [190, 41]

    def test_fills_from_other_calls_and_tenants_of_the_same_model(self) -> None:
        scheduler, one, two = Scheduler(10_000), lane("one"), lane("two")
        for tenant in "abc":
            scheduler.submit(job(one, [10], key_id=tenant))
            scheduler.submit(job(two, [10], key_id=tenant))
        first, second = cut_all(scheduler)
        assert first.lane is one
        assert second.lane is two
        assert len(first.items) == len(second.items) == 3

    def test_fills_a_batch_with_one_kind_where_enough_of_it_waits(self) -> None:
        scheduler, model = Scheduler(10_000), lane(max_tokens=100)
        for i in range(30):
            scheduler.submit(job(model, [10], kind="ab"[i % 2], key_id="xyz"[i % 3]))
        batches = cut_all(scheduler)
        assert [b.tokens for b in batches] == [80, 80, 80, 60]
        assert [Counter(each.kind for each, _ in b.items) for b in batches] == [
            {"a": 8},
            {"a": 7, "b": 1},
            {"b": 8},
            {"b": 6},
        ]

    def test_mixes_kinds_up_to_what_is_no_loss(self) -> None:
        scheduler, model = Scheduler(10_000), lane(max_tokens=100, mixed_tokens=40)
        for i in range(12):
            scheduler.submit(job(model, [10], kind="ab"[i % 2], key_id="xyz"[i % 3]))
        scheduler.submit(job(model, [10], kind="c"))
        # Six of one kind are more than a mixed batch may hold; one without any of its kind is joined.
        assert [(b.kind, b.tokens) for b in cut_all(scheduler)] == [("a", 60), ("c", 40), ("b", 30)]

    def test_no_kind_is_kept_waiting_by_another(self) -> None:
        scheduler, model = Scheduler(100_000), lane(max_tokens=50, mixed_tokens=50)
        for kind, key, count in (("a", "x", 100), ("b", "x", 1), ("a", "x", 100), ("a", "y", 1_000)):
            for _ in range(count):
                scheduler.submit(job(model, [10], kind=kind, key_id=key))
        kinds = [batch.kind for batch in cut_all(scheduler)]
        # Batches of four: behind a hundred that came before, and as many of the other tenant.
        assert kinds.index("b") == 50

    def test_leaves_work_for_the_other_workers_when_there_is_little(self) -> None:
        scheduler = Scheduler(10_000)
        scheduler.submit(job(lane(max_tokens=512, min_tokens=64), [50] * 4))
        assert [b.tokens for b in cut_all(scheduler, workers=2)] == [100, 50, 50]

    def test_skips_what_does_not_fit_and_takes_what_does(self) -> None:
        scheduler, model = Scheduler(10_000), lane(max_tokens=100)
        for length in (60, 70, 40):
            scheduler.submit(job(model, [length]))
        assert [b.tokens for b in cut_all(scheduler)] == [100, 70]


class TestOrder:
    def test_interactive_goes_first(self) -> None:
        scheduler, model = Scheduler(10_000), lane(max_tokens=10)
        scheduler.submit(job(model, [10] * 3, key_id="batch", priority=Priority.BATCH))
        scheduler.submit(job(model, [10] * 3, key_id="person"))
        assert [owners(b) for b in cut_all(scheduler)] == [{"person"}] * 3 + [{"batch"}] * 3

    def test_batch_work_never_starves(self) -> None:
        scheduler, model = Scheduler(10**9, batch_share=1 / 16), lane(max_tokens=10)
        scheduler.submit(job(model, [10] * 100, key_id="batch", priority=Priority.BATCH))
        served = Counter[str]()
        for _ in range(800):
            scheduler.submit(job(model, [10, 10], key_id="person"))
            batch = scheduler.next_batch()
            assert batch is not None
            served.update(owners(batch))
        assert served["batch"] == pytest.approx(800 / 17, abs=2)

    def test_workers_of_one_class_leave_the_other_and_those_of_the_background_take_more(self) -> None:
        scheduler, model = Scheduler(10**9), lane(max_tokens=10, background_tokens=40)
        scheduler.submit(job(model, [10] * 10, priority=Priority.BATCH))
        assert not scheduler.has_work(Priority.INTERACTIVE)
        assert scheduler.next_batch(only=Priority.INTERACTIVE) is None
        scheduler.submit(job(model, [10] * 2, key_id="person"))
        background = scheduler.next_batch(only=Priority.BATCH)
        assert background is not None
        assert (owners(background), background.tokens) == ({"anonymous"}, 40)
        assert [b.tokens for b in _drained(scheduler, Priority.INTERACTIVE)] == [10, 10]
        assert [b.tokens for b in _drained(scheduler, Priority.BATCH)] == [40, 20]
        assert not scheduler.has_work()

    def test_tenants_share_equally_whatever_they_queue(self) -> None:
        scheduler, model = Scheduler(10**9), lane(max_tokens=64)
        for _ in range(50):
            scheduler.submit(job(model, [16] * 40, key_id="loud"))
        for _ in range(40):
            scheduler.submit(job(model, [64], key_id="quiet"))
        served = Counter[str]()
        for _ in range(80):
            batch = scheduler.next_batch()
            assert batch is not None
            for owner, place in batch.items:
                served[owner.key_id] += owner.lengths[place]
        assert served["quiet"] == served["loud"]

    def test_a_newcomer_waits_for_no_backlog(self) -> None:
        scheduler, model = Scheduler(10**9), lane(max_tokens=100)
        for _ in range(100):
            scheduler.submit(job(model, [20] * 50, key_id="loud"))
        for _ in range(30):
            assert scheduler.next_batch() is not None
        scheduler.submit(job(model, [20], key_id="quiet"))
        batch = scheduler.next_batch()
        assert batch is not None
        assert batch.items[0][0].key_id == "quiet"

    def test_idling_saves_up_nothing(self) -> None:
        scheduler, model = Scheduler(10**9), lane(max_tokens=10)
        scheduler.submit(job(model, [10] * 1000, key_id="steady"))
        for _ in range(500):
            scheduler.next_batch()
        scheduler.submit(job(model, [10] * 100, key_id="late"))
        served = Counter(next(iter(owners(b))) for b in cut_all(scheduler)[:40])
        assert served["late"] == pytest.approx(20, abs=1)

    def test_a_short_call_overtakes_a_huge_one_of_the_same_tenant(self) -> None:
        scheduler, model = Scheduler(10**9), lane(max_tokens=128)
        scheduler.submit(job(model, [16] * 2048))
        for _ in range(20):
            scheduler.next_batch()
        short = job(model, [16])
        scheduler.submit(short)
        batch = scheduler.next_batch()
        assert batch is not None
        assert batch.items[0][0] is short

    def test_a_huge_call_keeps_its_part_under_a_stream_of_short_ones(self) -> None:
        scheduler, model = Scheduler(10**9, patience=4.0), lane(max_tokens=16)
        huge = job(model, [16] * 100)
        scheduler.submit(huge)
        batches = 0
        while huge.order:
            scheduler.submit(job(model, [16]))
            scheduler.next_batch()
            batches += 1
        assert batches <= (1 + 4) * 100 + 1

    def test_lanes_of_dear_models_cost_more(self) -> None:
        scheduler, cheap, dear = (
            Scheduler(10**9),
            lane("cheap", max_tokens=10),
            lane("dear", max_tokens=10, weight=4.0),
        )
        scheduler.submit(job(cheap, [10] * 100, key_id="a"))
        scheduler.submit(job(dear, [10] * 100, key_id="b"))
        served = Counter(batch.lane.name for batch in (scheduler.next_batch() for _ in range(50)) if batch)
        assert served["cheap"] == pytest.approx(40, abs=1)


class TestBounds:
    def test_refuses_at_the_limit_and_takes_again_below_it(self) -> None:
        scheduler, model = Scheduler(100), lane(max_tokens=40)
        scheduler.submit(job(model, [40] * 2))
        scheduler.submit(job(model, [40] * 2))
        with pytest.raises(QueueFullError) as refused:
            scheduler.check_room()
        assert refused.value.excess_tokens == 61
        assert scheduler.next_batch() is not None
        assert scheduler.next_batch() is not None
        scheduler.check_room()

    def test_counts_promised_tokens(self) -> None:
        scheduler = Scheduler(100)
        scheduler.check_room(99)
        with pytest.raises(QueueFullError):
            scheduler.check_room(100)

    def test_a_call_above_the_whole_limit_is_possible(self) -> None:
        scheduler = Scheduler(100)
        scheduler.check_room()
        scheduler.submit(job(lane(), [50] * 10))
        assert scheduler.queued_tokens == 500

    def test_drops_what_expired(self) -> None:
        scheduler, model = Scheduler(10_000), lane()
        late, timely = job(model, [10], deadline=5.0), job(model, [10], deadline=6.0)
        scheduler.submit(late)
        scheduler.submit(timely)
        batch = scheduler.next_batch(now=5.0)
        assert batch is not None
        assert batch.items == [(timely, 0)]
        assert scheduler.take_expired() == [late]
        assert scheduler.take_expired() == []
        assert scheduler.queued_tokens == scheduler.queued_items == 0

    def test_drops_what_is_discarded(self) -> None:
        scheduler, model = Scheduler(10_000), lane(max_tokens=10)
        jobs = [job(model, [10] * 3) for _ in range(4)]
        for each in jobs:
            scheduler.submit(each)
        scheduler.next_batch()
        assert scheduler.discard(jobs[0]) == 2
        assert scheduler.discard(jobs[0]) == 0
        assert scheduler.discard(jobs[2]) == 3
        assert Counter(b.items[0][0] for b in cut_all(scheduler)) == {jobs[1]: 3, jobs[3]: 3}

    def test_discarded_jobs_do_not_pile_up(self) -> None:
        scheduler, model = Scheduler(10_000), lane()
        scheduler.submit(job(model, [10]))
        for _ in range(10_000):
            passing = job(model, [10])
            scheduler.submit(passing)
            scheduler.discard(passing)
        (tenant,) = scheduler._tenants()
        assert len(tenant.heaps[model, ""]) < 300

    def test_tenants_whose_calls_were_discarded_do_not_pile_up(self) -> None:
        scheduler, model = Scheduler(10_000), lane()
        scheduler.submit(job(model, [10], key_id="waits"))
        for i in range(2_000):
            passing = job(model, [10], key_id=f"passes {i}")
            scheduler.submit(passing)
            scheduler.discard(passing)
        assert len(scheduler._classes[Priority.INTERACTIVE].turns) < 300

    def test_drains(self) -> None:
        scheduler, model = Scheduler(10_000), lane()
        jobs = [job(model, [10] * 2, key_id=t, priority=p) for t in "ab" for p in Priority]
        for each in jobs:
            scheduler.submit(each)
        assert set(scheduler.drain()) == set(jobs)
        assert scheduler.next_batch() is None
        assert scheduler.queued_tokens == model.queued_items == 0

    @pytest.mark.parametrize("lengths", [[], [0], [5, 0]])
    def test_refuses_jobs_without_tokens(self, lengths: list[int]) -> None:
        with pytest.raises(ValueError, match="at least one token"):
            job(lane(), lengths)


arrivals = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "cut", "discard"]),
        st.lists(st.integers(1, 600), min_size=1, max_size=12),
        st.sampled_from("abc"),
        st.sampled_from(list(Priority)),
        st.integers(0, 1),
        st.sampled_from(["", "a", "b"]),
    ),
    max_size=60,
)


@given(arrivals, st.integers(1, 512), st.sampled_from([1.0, 1.5, float("inf")]), st.integers(1, 3))
def test_every_item_runs_once_or_is_dropped(
    events: list[tuple[str, list[int], str, Priority, int, str]],
    budget: int,
    ratio: float,
    workers: int,
) -> None:
    scheduler = Scheduler(10**9)
    lanes = [
        lane("m0", max_tokens=budget, max_length_ratio=ratio),
        lane("m1", max_tokens=2 * budget, mixed_tokens=budget, weight=3.0),
    ]
    jobs: list[AnyJob] = []
    run = Counter[tuple[int, int]]()
    dropped = 0

    def check(batch: Batch | None) -> None:
        if batch is None:
            assert scheduler.queued_items == 0
            return
        lengths = [owner.lengths[place] for owner, place in batch.items]
        assert batch.items
        assert batch.tokens == sum(lengths)
        assert batch.tokens <= batch.lane.max_tokens or len(lengths) == 1
        kinds = {owner.kind for owner, _ in batch.items}
        assert batch.kind in kinds
        assert batch.tokens <= batch.lane.mixed_tokens or len(kinds) == 1
        assert max(lengths) <= batch.lane.max_length_ratio * min(lengths)
        assert {owner.lane for owner, _ in batch.items} == {batch.lane}
        assert len({owner.priority for owner, _ in batch.items}) == 1
        run.update((id(owner), place) for owner, place in batch.items)

    for event, lengths, tenant, priority, which, kind in events:
        if event == "submit":
            jobs.append(job(lanes[which], lengths, kind=kind, key_id=tenant, priority=priority))
            scheduler.submit(jobs[-1])
        elif event == "cut":
            check(scheduler.next_batch(workers=workers))
        elif jobs:
            dropped += scheduler.discard(jobs[len(lengths) % len(jobs)])
        assert scheduler.queued_items == sum(len(each.order) for each in jobs)
        assert scheduler.queued_tokens == sum(each.waiting_tokens for each in jobs)
    while scheduler.queued_items:
        check(scheduler.next_batch(workers=workers))
    assert scheduler.next_batch() is None
    assert set(run.values()) <= {1}
    assert len(run) + dropped == sum(len(each.lengths) for each in jobs)
    assert all(each.queued_tokens == each.queued_items == 0 for each in lanes)
