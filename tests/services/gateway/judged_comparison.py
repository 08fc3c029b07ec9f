"""A labeling server with one blind comparison of two versions that a person has judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from tests.services.labeling.browser import start_server
from trimtab.labeling.campaigns import find_campaign
from trimtab.labeling.database import Database
from trimtab.labeling.judgments import Draft, submit
from trimtab.labeling.labelers import add_labeler, find_labeler
from trimtab.labeling.leases import next_task
from trimtab.labeling.vocabulary import Role
from trimtab_client import LabelingClient

SFT, PPO = "kind-stories/policy@1", "kind-stories/policy@3"
CAMPAIGN = "ppo-or-sft"
LIKED = "And everyone was happy."


@contextmanager
def judged_comparison(folder: Path, wins: int, losses: int) -> Iterator[tuple[str, Path]]:
    """(address, file of a lead's token); PPO's answer was preferred `wins` times, SFT's `losses` times."""
    database = Database(str(folder / "labels.sqlite"))
    database.migrate()
    now = datetime.now(UTC)
    with database.write() as session:
        token = add_labeler(session, "lea", Role.LEAD, now)[1]
        add_labeler(session, "ann", Role.LABELER, now)
    token_file = folder / "lead.token"
    token_file.write_text(token)
    process, address = start_server(str(folder / "labels.sqlite"))
    try:
        client = LabelingClient(address, token, timeout_s=10)
        client.create_campaign({"name": CAMPAIGN, "title": "PPO or SFT?", "kind": "comparison"})
        client.add_rows(CAMPAIGN, [_row(task, likes_ppo=task < wins) for task in range(wins + losses)])
        for _ in range(wins + losses):
            _judge_next(database, now)
        yield address, token_file
    finally:
        process.kill()
        process.wait()
        database.close()


def _row(task: int, *, likes_ppo: bool) -> dict[str, object]:
    answers = [LIKED, "The end."]
    return {
        "task": f"t{task}",
        "prompt": f"Once upon a time there were {task} dogs.",
        "responses": answers if likes_ppo else answers[::-1],
        "versions": [PPO, SFT],
    }


def _judge_next(database: Database, now: datetime) -> None:
    with database.write() as session:
        person = find_labeler(session, "ann")
        lease = next_task(session, find_campaign(session, CAMPAIGN), person, now)
        assert lease is not None
        texts = [response.text for response in lease.task.responses]
        ranks = tuple(1 if texts[position] == LIKED else 2 for position in lease.order)
        submit(session, lease.task_id, person, Draft(f"key-of-{lease.task_id:04}", ranks=ranks), now)
