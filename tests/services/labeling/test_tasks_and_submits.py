"""Who gets which task, and what becomes of what they send: on SQLite and on PostgreSQL."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select

from trimtab.labeling.campaigns import CampaignPlan, change_campaign, create_campaign, find_campaign
from trimtab.labeling.errors import ConflictError, InvalidError, NotFoundError
from trimtab.labeling.exporting import export_rows
from trimtab.labeling.importing import import_rows
from trimtab.labeling.judgments import Draft, find_judgment, shown, submit
from trimtab.labeling.labelers import add_labeler, by_token, delete_labeler, disable_labeler, labeler_data
from trimtab.labeling.leases import lease_for_adjudication, next_task, renew, skip_task
from trimtab.labeling.reports import progress
from trimtab.labeling.rows import read_rows
from trimtab.labeling.tables import Labeler, Lease, Table
from trimtab.labeling.vocabulary import Ask, Role


def task_lines(count: int, k: int = 4) -> list[str]:
    return [json.dumps({"prompt": f"p{i}", "responses": [f"p{i} r{j}" for j in range(k)]}) for i in range(count)]


@pytest.fixture
def room(database, now):
    """room(tasks=…, labelers=…, **plan): a campaign "c" with tasks and labelers, ready to work."""

    def make(*, tasks: int = 3, labelers: tuple[str, ...] = ("ann", "bob", "cy"), **plan):
        with database.write() as session:
            for name in labelers:
                add_labeler(session, name, Role.LABELER, now)
            create_campaign(session, CampaignPlan("c", **plan), None, now)
        import_rows(database, "c", read_rows(task_lines(tasks)), now)

    return make


def take(database, name: str, at) -> Lease | None:
    with database.write() as session:
        labeler = session.scalar(select(Labeler).where(Labeler.name == name))
        return next_task(session, find_campaign(session, "c"), labeler, at)


def send(database, name: str, task_id: int, draft: Draft, at, **options):
    with database.write() as session:
        labeler = session.scalar(select(Labeler).where(Labeler.name == name))
        return submit(session, task_id, labeler, draft, at, **options)


def judgment(database, name: str, task_id: int):
    with database.read() as session:
        labeler = session.scalar(select(Labeler).where(Labeler.name == name))
        return find_judgment(session, task_id, labeler)


def test_the_migrations_make_the_tables_that_the_code_declares(database):
    with database.read() as session:
        assert compare_metadata(MigrationContext.configure(session.connection()), Table.metadata) == []


def test_sqlite_waits_for_the_disk(tmp_path):
    from trimtab.labeling.database import Database

    database = Database(str(tmp_path / "x.sqlite"))
    with database.write() as session:
        connection = session.connection()
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_a_task_is_in_one_persons_hands_until_the_lease_expires(database, room, now):
    room(tasks=1, lease_s=60)
    first = take(database, "ann", now)
    assert first is not None
    assert take(database, "bob", now) is None
    again = take(database, "ann", now)
    assert (again.task_id, again.order) == (first.task_id, first.order)
    assert take(database, "bob", now + timedelta(seconds=61)).task_id == first.task_id


def test_a_renewed_lease_keeps_others_away(database, room, now):
    room(tasks=1, lease_s=60)
    lease = take(database, "ann", now)
    with database.write() as session:
        ann = session.get_one(Labeler, lease.labeler_id)
        renew(session, lease.task_id, ann, now + timedelta(seconds=50))
    assert take(database, "bob", now + timedelta(seconds=100)) is None


def test_a_late_ranking_is_taken_though_somebody_else_has_the_task_now(database, room, now):
    room(tasks=1, lease_s=60)
    lease = take(database, "ann", now)
    later = now + timedelta(hours=2)
    assert take(database, "bob", later) is not None
    send(database, "ann", lease.task_id, Draft("key-late-1", ranks=(1, 2, 3, 4)), later)
    assert judgment(database, "ann", lease.task_id) is not None


def test_overlap_hands_a_task_to_that_many_people_and_no_more(database, room, now):
    room(tasks=1, overlap=2)
    task_id = take(database, "ann", now).task_id
    assert take(database, "bob", now).task_id == task_id
    assert take(database, "cy", now) is None
    send(database, "ann", task_id, Draft("key-ann-01", ranks=(1, 2, 3, 4)), now)
    assert take(database, "cy", now) is None
    assert take(database, "ann", now) is None


def test_many_people_at_once_never_hold_one_task_too_often(database, now):
    people = [f"p{i}" for i in range(12)]
    with database.write() as session:
        for name in people:
            add_labeler(session, name, Role.LABELER, now)
        create_campaign(session, CampaignPlan("c", overlap=2), None, now)
    import_rows(database, "c", read_rows(task_lines(6)), now)
    start = Barrier(len(people))

    def ask(name: str) -> int | None:
        start.wait()
        lease = take(database, name, now)
        return lease.task_id if lease else None

    with ThreadPoolExecutor(len(people)) as pool:
        taken = [task for task in pool.map(ask, people) if task is not None]
    assert max(Counter(taken).values()) <= 2
    left = [take(database, name, now) for name in people]  # who found all rows locked asks again
    assert Counter(lease.task_id for lease in left if lease) == dict.fromkeys(set(taken), 2)


def test_a_quota_ends_one_persons_work(database, room, now):
    room(tasks=3, quota=1)
    lease = take(database, "ann", now)
    send(database, "ann", lease.task_id, Draft("key-quota1", ranks=(1, 1, 1, 2)), now)
    assert take(database, "ann", now) is None
    assert take(database, "bob", now) is not None


def test_a_skipped_task_goes_to_others_and_not_back(database, room, now):
    room(tasks=1)
    lease = take(database, "ann", now)
    for _ in range(2):
        with database.write() as session:
            skip_task(session, lease.task_id, session.get_one(Labeler, lease.labeler_id), "unclear", now)
    assert take(database, "ann", now) is None
    assert take(database, "bob", now).task_id == lease.task_id


def test_a_closed_campaign_hands_nothing_out(database, room, now):
    room(tasks=1)
    with database.write() as session:
        change_campaign(session, "c", {"state": "closed"})
    assert take(database, "ann", now) is None


def test_ranks_are_kept_by_response_whatever_order_was_shown(database, room, now):
    room(tasks=1)
    lease = take(database, "ann", now)
    draft = Draft("key-order1", ranks=(1, 4, 4, 2), ratings=(7, None, 2, 5), flags=(("sexual",), (), (), ()))
    send(database, "ann", lease.task_id, draft, now)
    saved = judgment(database, "ann", lease.task_id)
    assert shown(saved.ranks, lease.order) == [1, 3, 3, 2]
    assert shown(saved.ratings, lease.order) == [7, None, 2, 5]
    assert shown(saved.flags, lease.order) == [["sexual"], [], [], []]
    assert next(export_rows(database, "c"))["ranks"] == saved.ranks


def test_orders_are_shuffled_for_each_person(database, now):
    with database.write() as session:
        add_labeler(session, "ann", Role.LABELER, now)
        create_campaign(session, CampaignPlan("c", lease_s=30), None, now)
    import_rows(database, "c", read_rows(task_lines(40, k=9)), now)
    orders = set()
    for i in range(40):
        lease = take(database, "ann", now)
        send(database, "ann", lease.task_id, Draft(f"key-shuffle-{i}", ranks=(1,) * 9), now)
        orders.add(tuple(lease.order))
    assert len(orders) > 35


def test_sending_twice_is_one_ranking(database, room, now):
    room(tasks=2)
    lease = take(database, "ann", now)
    draft = Draft("key-twice1", ranks=(2, 1, 3, 3), note="hm")
    first = send(database, "ann", lease.task_id, draft, now)
    assert send(database, "ann", lease.task_id, draft, now) == first
    with pytest.raises(ConflictError):
        send(database, "ann", lease.task_id, Draft("key-twice1", ranks=(1, 2, 3, 4)), now)
    assert len(list(export_rows(database, "c"))) == 1


def test_one_key_sent_many_times_at_once_is_one_ranking(database, room, now):
    room(tasks=1)
    lease = take(database, "ann", now)
    draft = Draft("key-at-once", ranks=(2, 1, 3, 3))
    with ThreadPoolExecutor(8) as pool:
        receipts = set(pool.map(lambda _: send(database, "ann", lease.task_id, draft, now), range(16)))
    assert len(receipts) == 1 and receipts.pop().revision == 1


def test_editing_keeps_the_order_and_every_earlier_save(database, room, now):
    room(tasks=1)
    lease = take(database, "ann", now)
    send(database, "ann", lease.task_id, Draft("key-edit-1", ranks=(1, 2, 3, 4)), now)
    receipt = send(database, "ann", lease.task_id, Draft("key-edit-2", ranks=(4, 3, 2, 1)), now + timedelta(hours=1))
    saved = judgment(database, "ann", lease.task_id)
    assert receipt.revision == 2 and shown(saved.ranks, lease.order) == [4, 3, 2, 1] and saved.submitted_at == now
    with database.read() as session:
        kept = labeler_data(session, "ann")["submissions"]
        assert [one["content"]["ranks"] for one in kept] == [[1, 2, 3, 4], [4, 3, 2, 1]]
        assert progress(session, find_campaign(session, "c"), now).judgments == 1


@pytest.mark.parametrize(
    ("draft", "field"),
    [
        (Draft("short", ranks=(1, 2, 3, 4)), "key"),
        (Draft("key-wrong1", ranks=(1, 2, 3)), "ranks"),
        (Draft("key-wrong2", ranks=(0, 1, 2, 3)), "ranks[0]"),
        (Draft("key-wrong3", ranks=(1, 2, 3, 4), ratings=(8, 1, 1, 1)), "ratings[0]"),
        (Draft("key-wrong4", ranks=(1, 2, 3, 4), ratings=(1, 1, 1, 1), flags=(("rude",), (), (), ())), "flags[0]"),
        (Draft("key-wrong5", ranks=(1, 2, 3, 4), ratings=(1, None, 1, 1)), "ratings[1]"),
    ],
)
def test_a_wrong_ranking_is_refused_by_its_field(database, room, now, draft, field):
    room(tasks=1, ratings=Ask.REQUIRED)
    lease = take(database, "ann", now)
    with pytest.raises(InvalidError) as refused:
        send(database, "ann", lease.task_id, draft, now)
    assert refused.value.field == field


def test_a_task_that_was_never_handed_out_is_not_theirs_to_judge(database, room, now):
    room(tasks=1)
    lease = take(database, "ann", now)
    with pytest.raises(NotFoundError):
        send(database, "bob", lease.task_id, Draft("key-theirs", ranks=(1, 2, 3, 4)), now)


def test_deleting_a_labeler_removes_all_they_did_and_opens_their_tasks(database, room, now):
    room(tasks=1)
    lease = take(database, "ann", now)
    send(database, "ann", lease.task_id, Draft("key-delete", ranks=(1, 2, 3, 4)), now)
    with database.write() as session:
        assert delete_labeler(session, "ann") == 1
    assert list(export_rows(database, "c")) == []
    assert take(database, "bob", now).task_id == lease.task_id


def test_a_disabled_labeler_is_let_in_no_more_and_what_they_said_stays(database, now):
    with database.write() as session:
        _, token = add_labeler(session, "ann", Role.LABELER, now)
    with database.write() as session:
        assert by_token(session, token, "ann") is not None
        assert by_token(session, token, "bob") is None
        disable_labeler(session, "ann", now)
        assert by_token(session, token, "ann") is None


def test_an_adjudication_stands_beside_the_rankings_and_wins_when_asked(database, room, now):
    room(tasks=1, overlap=2)
    for name, ranks in (("ann", (1, 2, 3, 4)), ("bob", (4, 3, 2, 1))):
        lease = take(database, name, now)
        send(database, name, lease.task_id, Draft(f"key-{name}-adj", ranks=ranks), now)
    with database.write() as session:
        cy = session.scalar(select(Labeler).where(Labeler.name == "cy"))
        lease_for_adjudication(session, lease.task_id, cy, now)
    send(database, "cy", lease.task_id, Draft("key-cy-adj", ranks=(1, 1, 1, 1)), now, adjudicate=True)
    assert [row["labeler"] for row in export_rows(database, "c")] == ["ann", "bob", "cy"]
    assert [row["labeler"] for row in export_rows(database, "c", resolve=True)] == ["cy"]
    with database.read() as session:
        state = progress(session, find_campaign(session, "c"), now)
        assert (state.judgments, state.finished, state.waiting) == (2, 1, 0)
