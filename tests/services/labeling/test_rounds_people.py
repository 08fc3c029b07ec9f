"""People as a round's source of rankings: the run makes a campaign, waits for the page, and takes what was said."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import yaml
from sqlalchemy import delete

from tests.services.labeling.browser import start_server
from trimtab.labeling.campaigns import change_campaign, find_campaign
from trimtab.labeling.database import Database
from trimtab.labeling.judgments import Draft, submit
from trimtab.labeling.labelers import add_labeler, find_labeler
from trimtab.labeling.leases import next_task
from trimtab.labeling.tables import Campaign
from trimtab.labeling.vocabulary import Role
from trimtab.rounds.duel.people import people_wins
from trimtab.rounds.duel.plan import DuelError, DuelPlan, Side
from trimtab.rounds.journal import Journal, exclusive
from trimtab.rounds.ranking.people_source import PeopleSource
from trimtab.rounds.ranking.source import AnswerSet, write_rows
from trimtab.rounds.recipe import Recipe
from trimtab.rounds.stages.context import RoundsContext
from trimtab.rounds.stages.ranking import run_rank, sets_file
from trimtab.rounds.status import StageStatus, read_status
from trimtab_client import LabelingClient, Sampling

EXAMPLES = Path(__file__).parents[3] / "examples"
SETS = [AnswerSet(f"s-r1-{i}", f"p{i} \u2028", tuple("abcd"), (True, True, False, True)) for i in range(3)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(database, its path, client, Lea's token, process, address) of a real server; ann and bob label, lea leads."""
    now = datetime.now(UTC)
    path = str(tmp_path_factory.mktemp("people") / "labels.sqlite")
    database = Database(path)
    database.migrate()
    with database.write() as session:
        tokens = {
            name: add_labeler(session, name, role, now)[1]
            for name, role in (("lea", Role.LEAD), ("ann", Role.LABELER), ("bob", Role.LABELER))
        }
    process, address = start_server(path)
    yield database, path, LabelingClient(address, tokens["lea"], timeout_s=10), tokens["lea"], process, address
    process.kill()
    process.wait()
    database.close()


@pytest.fixture
def page(served):
    """(database, client), the campaign of an earlier test gone."""
    database, _, client, *_ = served
    with database.write() as session:
        session.execute(delete(Campaign).where(Campaign.name == "s-r1"))
    return database, client


def source(client: LabelingClient, minimum: int = 1) -> PeopleSource:
    return PeopleSource(client, "s-r1", minimum=minimum, title="s, round 1", guideline="", poll_s=0.1)


def rank_next(database: Database, name: str, now) -> None:
    """One ranking by a person: the answer "d" first, "a" and "b" tied, "c" last."""
    with database.write() as session:
        person = find_labeler(session, name)
        lease = next_task(session, find_campaign(session, "s-r1"), person, now)
        wanted = {0: 2, 1: 2, 2: 3, 3: 1}
        draft = Draft(f"key-{name}-{lease.task_id}", ranks=tuple(wanted[position] for position in lease.order))
        submit(session, lease.task_id, person, draft, now)


def test_a_round_waits_for_people_and_takes_their_rankings(page, now):
    database, client = page
    people = source(client, minimum=2)
    for _ in range(2):  # a restart offers again
        people.offer(SETS, Path("unused"))
    assert "0 of 3 sets are ranked by 2 people" in people.poll(SETS).waiting
    for _ in SETS:
        rank_next(database, "ann", now)
    assert "0 of 3" in people.poll(SETS).waiting
    for _ in SETS:
        rank_next(database, "bob", now)
    collected = people.poll(SETS)
    assert collected.waiting == "" and len(collected.rankings) == 6
    assert {ranked.ranks for ranked in collected.rankings} == {(2, 2, 3, 1)}
    assert {(ranked.answers.task, ranked.labeler) for ranked in collected.rankings} == {
        (answers.task, name) for answers in SETS for name in ("ann", "bob")
    }


def test_closing_the_campaign_ends_the_wait(page, now):
    database, client = page
    people = source(client)
    people.offer(SETS, Path("unused"))
    rank_next(database, "ann", now)
    rank_next(database, "ann", now)
    assert "2 of 3" in people.poll(SETS).waiting
    with database.write() as session:
        change_campaign(session, "s-r1", {"state": "closed"})
    assert len(people.poll(SETS).rankings) == 2


def test_the_exported_rankings_of_a_round_are_what_the_file_source_reads(page, now, tmp_path):
    from trimtab.rounds.ranking.file_source import FileSource

    database, client = page
    people = source(client)
    people.offer(SETS, Path("unused"))
    for _ in SETS:
        rank_next(database, "ann", now)
    file = tmp_path / "rankings.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in client.rows("s-r1")))
    assert FileSource(file, 1, 0).poll(SETS) == people.poll(SETS)


def test_a_comparison_on_the_page_is_the_human_win_rate_of_the_second_model(page, served, tmp_path, now):
    database, client = page
    (tmp_path / "token").write_text(served[3])
    first, second = answered("a", [["left 0"], ["left 1"], ["same"]]), answered("b", [["x"], ["y"], ["same"]])
    judge = f"people:{client.address}/c/a-or-b"
    duel = DuelPlan("a", "b", ("p0", "p1", "p2"), judge, Sampling(seed=0), tmp_path, "", 1, tmp_path / "token")
    with pytest.raises(DuelError, match=r"0 of 2 sets are ranked on http.*/c/a-or-b; then run the same command again"):
        people_wins(duel, first, second)
    prefer(database, "a-or-b", {"x": 1, "left 0": 2}, now)
    prefer(database, "a-or-b", {"y": 1, "left 1": 1}, now)
    assert people_wins(duel, first, second).tolist() == [1.0, 0.5, 0.5]
    [rate] = client.win_rates("a-or-b")
    assert (rate["challenger"], rate["rate"], rate["identical"]) == ("run/b@1", pytest.approx(2 / 3), 1)


def test_the_rank_stage_waits_with_live_progress_in_rounds_status(page, served, tmp_path, now):
    database, client = page
    (tmp_path / "token").write_text(served[3])
    settings = yaml.safe_load((EXAMPLES / "rounds" / "stories.yaml").read_text())
    rank = {"source": "people", "address": client.address, "token_file": str(tmp_path / "token"), "poll_s": 0.1}
    recipe = Recipe.model_validate(settings | {"name": "s", "rank": rank})
    folder = tmp_path / "run"
    folder.mkdir()
    journal = Journal(folder)
    journal.begin(recipe.model_dump(mode="json"), {})
    context = RoundsContext(recipe, None, folder, None, journal, None, ExitStack(), lambda text: None)
    write_rows(sets_file(context, 1), (answers.row() for answers in SETS))
    with exclusive(folder), ThreadPoolExecutor(1) as pool:
        attempt = journal.start("1/rank")
        stage = pool.submit(run_rank, context, 1)
        for ranked in range(len(SETS)):
            wait_until(lambda ranked=ranked: f"{ranked} of 3 sets are ranked" in rank_stage(folder).detail)
            assert rank_stage(folder).state == "waiting" and client.address in rank_stage(folder).detail
            rank_next(database, "ann", now)
        journal.complete("1/rank", attempt, stage.result(timeout=30))
    assert rank_stage(folder).state == "done" and "rankings=3" in rank_stage(folder).detail
    rows = [json.loads(line) for file in (folder / "rankings").rglob("*.jsonl") for line in file.open()]
    assert {row["task"] for row in rows} == {answers.task for answers in SETS}


def rank_stage(folder: Path) -> StageStatus:
    return next(stage for stage in read_status(folder).stages if stage.name == "1/rank")


def wait_until(happened) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def answered(name: str, texts: list[list[str]]) -> Side:
    one = np.ones((len(texts), 1))
    return Side(name, f"run/{name}@1", tuple(map(tuple, texts)), one, one.astype(bool))


def prefer(database: Database, campaign: str, ranks: dict[str, int], now) -> None:
    """Ann judges the pair that she is given next by the ranks of its texts."""
    with database.write() as session:
        person = find_labeler(session, "ann")
        lease = next_task(session, find_campaign(session, campaign), person, now)
        texts = [response.text for response in lease.task.responses]
        given = tuple(ranks[texts[position]] for position in lease.order)
        submit(session, lease.task_id, person, Draft(f"key-{lease.task_id}-pair", ranks=given), now)


def test_a_page_that_is_away_delays_the_round_and_nothing_else(served, page):
    _, path, client, _, process, address = served
    process.kill()
    process.wait()
    people = source(client)
    people.offer(SETS, Path("unused"))
    assert "does not answer" in people.poll(SETS).waiting
    again, _ = start_server(path, port=int(address.rpartition(":")[2]))
    try:
        assert "0 of 3" in people.poll(SETS).waiting
    finally:
        again.kill()
        again.wait()
