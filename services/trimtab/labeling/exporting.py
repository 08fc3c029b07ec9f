"""What people said, as rows of JSONL: rankings as the reward model's loader takes them, demonstrations as SFT's.

One row a judgment, with everything about it that is not the labeler's secret. docs/labeling.md lists the fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from trimtab.labeling.campaigns import find_campaign
from trimtab.labeling.database import Database
from trimtab.labeling.tables import Campaign, Judgment, Task
from trimtab.labeling.vocabulary import Kind

TASKS_PER_READ = 200


def export_rows(database: Database, campaign_name: str, *, resolve: bool = False) -> Iterator[dict[str, Any]]:
    """All judgments of a campaign, by task and time. NotFoundError at the first row.

    With `resolve`, where a lead adjudicated a task, only that judgment.
    """
    with database.read() as session:
        campaign = find_campaign(session, campaign_name)
    after = (-1, -1)
    while True:
        with database.read() as session:
            tasks = _tasks_after(session, campaign, after)
            for task in tasks:
                judgments = _judgments(session, task)
                if resolve and any(judgment.is_adjudication for judgment in judgments):
                    judgments = [judgment for judgment in judgments if judgment.is_adjudication]
                for judgment in judgments:
                    yield judgment_row(campaign, task, judgment)
        if not tasks:
            return
        after = (tasks[-1].position, tasks[-1].id)


def export_lines(database: Database, campaign_name: str, *, resolve: bool = False) -> Iterator[str]:
    """`export_rows` as lines of JSONL."""
    for row in export_rows(database, campaign_name, resolve=resolve):
        yield json.dumps(row, ensure_ascii=False) + "\n"


def judgment_row(campaign: Campaign, task: Task, judgment: Judgment) -> dict[str, Any]:
    """One judgment as a row."""
    about = {
        "labeler": judgment.labeler.name,
        "task": task.key,
        "campaign": campaign.name,
        "seconds": round(judgment.seconds, 1),
        "started_at": judgment.started_at.isoformat(),
        "submitted_at": judgment.submitted_at.isoformat(),
        "revision": judgment.revision,
        "adjudication": judgment.is_adjudication,
        "note": judgment.note,
    }
    if campaign.kind == Kind.DEMONSTRATION:
        return _demonstration(task.prompt, judgment.answer) | about
    said = {
        "responses": [response.text for response in task.responses],
        "ranks": judgment.ranks,
        "ended": [response.ended for response in task.responses],
        "versions": [response.version for response in task.responses],
        "order_shown": judgment.order,
        "ratings": judgment.ratings,
        "flags": judgment.flags,
        "notes": judgment.notes,
    }
    return task.prompt | said | about


def _demonstration(prompt: dict[str, Any], answer: str) -> dict[str, Any]:
    if "messages" in prompt:
        return {"messages": [*prompt["messages"], {"role": "assistant", "content": answer}]}
    return prompt | {"completion": answer}


def _tasks_after(session: Session, campaign: Campaign, after: tuple[int, int]) -> list[Task]:
    position, task_id = after
    query = (
        select(Task)
        .where(
            Task.campaign_id == campaign.id,
            (Task.position > position) | ((Task.position == position) & (Task.id > task_id)),
        )
        .order_by(Task.position, Task.id)
        .limit(TASKS_PER_READ)
        .options(selectinload(Task.responses))
    )
    return list(session.scalars(query))


def _judgments(session: Session, task: Task) -> list[Judgment]:
    query = select(Judgment).where(Judgment.task_id == task.id).options(selectinload(Judgment.labeler))
    return list(session.scalars(query.order_by(Judgment.submitted_at, Judgment.id)))
