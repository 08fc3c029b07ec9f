"""The queue is fed by a real generator: K distinct answers of named versions, resumable, by one server at a time."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.services.labeling.browser import start_server
from trimtab.labeling.campaigns import CampaignPlan, SamplingPlan, Source, create_campaign, find_campaign
from trimtab.labeling.database import Database
from trimtab.labeling.feeding import Feeder, FeedError, feed_campaign
from trimtab.labeling.importing import import_rows
from trimtab.labeling.labelers import add_labeler
from trimtab.labeling.reports import progress
from trimtab.labeling.rows import read_rows
from trimtab.labeling.tables import Campaign, Task
from trimtab.labeling.vocabulary import Kind, Role, TaskState
from trimtab.rounds.launchers.local import Supervisor
from trimtab.rounds.launchers.services import service_process
from trimtab.weights.store import open_store
from trimtab_client import LabelingClient

OLD, NEW = "run/policy@1", "run/policy@2"
COUNT = 36  # more than one batch


@pytest.fixture(scope="module")
def generator(make_tiny, tmp_path_factory) -> Iterator[str]:
    """The address of a generator process that has two versions of a tiny policy, of which it serves the first."""
    folder = tmp_path_factory.mktemp("generator")
    store = open_store(str(folder / "store"))
    store.publish(make_tiny("policy", seed=1), run_id="run", name="policy", step=1)
    store.publish(make_tiny("policy", seed=2), run_id="run", name="policy", step=2, set_current=False)
    with Supervisor() as supervisor:
        settings = {"store": str(folder / "store"), "model": f"version:{OLD}"}
        spec = service_process("generator", settings, folder / "services", threads=1)
        supervisor.add(spec)
        supervisor.wait_ready(spec.name)
        yield spec.address


@pytest.fixture
def room(tmp_path, generator):
    """room(sources, **plan): a SQLite database whose campaign "c" has prompts that wait for answers, and its path."""
    opened = []

    def make(sources: tuple[Source, ...], **plan) -> tuple[Database, Path]:
        database = Database(str(tmp_path / "labels.sqlite"))
        opened.append(database)
        database.migrate()
        now = datetime.now(UTC)
        asked = CampaignPlan("c", sources=sources, **{"sampling": SamplingPlan(max_tokens=6)} | plan)
        with database.write() as session:
            create_campaign(session, asked, None, now)
        rows = [json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(COUNT)]
        import_rows(database, "c", read_rows(rows), now)
        return database, tmp_path / "labels.sqlite"

    yield make
    for database in opened:
        database.close()


def tasks(database: Database) -> list[Task]:
    with database.read() as session:
        found = session.query(Task).order_by(Task.position).all()
        for task in found:
            _ = task.responses
        return found


def test_each_prompt_gets_distinct_answers_of_the_versions_that_the_campaign_names(room, generator):
    database, _ = room((Source(generator, 2, OLD), Source(generator, 2, NEW)))
    seen = []
    report = feed_campaign(database, "c", progress=seen.append)
    assert report.ready == COUNT and len(seen) == 2
    for task in tasks(database):
        texts = [response.text for response in task.responses]
        versions = [response.version.rpartition("#")[0] or response.version for response in task.responses]
        assert task.state == TaskState.READY and len(set(texts)) == len(texts)
        assert versions == [OLD, OLD, NEW, NEW] or report.short > 0


def test_equal_answers_are_kept_once_and_the_task_is_then_shorter(room, generator):
    plan = {"responses_per_task": 9, "sampling": SamplingPlan(max_tokens=1, temperature=0.6)}
    database, _ = room((Source(generator, 9),), **plan)
    report = feed_campaign(database, "c")
    counts = [len(task.responses) for task in tasks(database)]
    assert report.short == sum(count < 9 for count in counts) > 0
    assert all(len({response.text for response in task.responses}) == len(task.responses) for task in tasks(database))


def test_feeding_goes_on_where_it_was_cut_off_with_the_same_answers(room, generator):
    database, _ = room((Source(generator, 4),))

    class CutOffError(Exception):
        pass

    def cut_off(report):
        raise CutOffError

    with pytest.raises(CutOffError):
        feed_campaign(database, "c", progress=cut_off)
    with database.read() as session:
        state = progress(session, find_campaign(session, "c"), datetime.now(UTC))
    assert 0 < state.filling < COUNT
    before = {task.key: [r.text for r in task.responses] for task in tasks(database) if task.responses}
    report = feed_campaign(database, "c")
    assert report.ready == state.filling
    after = {task.key: [r.text for r in task.responses] for task in tasks(database)}
    assert before.items() <= after.items() and all(len(texts) >= 2 for texts in after.values())
    assert feed_campaign(database, "c").ready == 0


def test_equal_answers_of_two_versions_are_a_tie_that_nobody_is_asked_about(room, generator):
    sources = (Source(generator, 1, OLD), Source(generator, 1, NEW))
    database, _ = room(sources, kind=Kind.COMPARISON, sampling=SamplingPlan(max_tokens=1, temperature=0.3))
    report = feed_campaign(database, "c")
    assert report.ready + report.identical == COUNT
    for task in tasks(database):
        first, second = (response.text for response in task.responses)
        assert task.state == (TaskState.IDENTICAL if first == second else TaskState.READY)


@pytest.mark.parametrize(
    ("address", "version", "reason"),
    [("127.0.0.1:1", "", "127.0.0.1:1"), (None, "run/policy@7", "policy@7"), (None, "latest", "RUN/NAME@STEP")],
)
def test_a_generator_that_cannot_answer_is_named_and_nothing_is_lost(room, generator, address, version, reason):
    database, _ = room((Source(address or generator, 4, version),))
    with pytest.raises(FeedError, match=reason):
        feed_campaign(database, "c")
    assert {task.state for task in tasks(database)} == {TaskState.FILLING}


def test_a_server_feeds_its_open_campaigns_by_itself(room, generator):
    database, path = room((Source(generator, 4),))
    with database.write() as session:
        _, token = add_labeler(session, "lea", Role.LEAD, datetime.now(UTC))
    process, address = start_server(str(path))
    try:
        client = LabelingClient(address, token, timeout_s=10)
        deadline = time.monotonic() + 60
        while client.progress("c")["filling"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0
    assert {task.state for task in tasks(database)} == {TaskState.READY}


def test_two_servers_never_feed_one_campaign_at_a_time(room, generator):
    database, _ = room((Source(generator, 4),))
    first, second = Feeder(database), Feeder(database)
    assert first._claim("c") and first._claim("c")
    assert not second._claim("c")
    with database.write() as session:
        session.query(Campaign).one().feeder_until = datetime.now(UTC)
    assert second._claim("c") and not first._claim("c")
