"""Rows into a campaign: prompts, responses to rank, rankings and demonstrations made elsewhere.

Importing the same rows again adds nothing, so an import that was cut short is simply done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session, selectinload

from trimtab.labeling.campaigns import find_campaign
from trimtab.labeling.database import Database
from trimtab.labeling.errors import InvalidError
from trimtab.labeling.judgments import close_gaps
from trimtab.labeling.labelers import imported_labeler
from trimtab.labeling.rows import TaskRow, Verdict
from trimtab.labeling.tables import Campaign, Judgment, Response, Task
from trimtab.labeling.vocabulary import Kind, TaskState

ROWS_PER_TRANSACTION = 200  # people who rank meanwhile wait for one of these at most
UNNAMED = "unnamed"


@dataclass(frozen=True)
class ImportReport:
    """What an import added; `repeated` rows were there already."""

    tasks: int = 0
    judgments: int = 0
    repeated: int = 0

    def plus(self, other: ImportReport) -> ImportReport:
        return ImportReport(self.tasks + other.tasks, self.judgments + other.judgments, self.repeated + other.repeated)


def import_rows(database: Database, campaign_name: str, rows: Sequence[TaskRow], now: datetime) -> ImportReport:
    """Add rows to a campaign, all of which are checked before the first is added. InvalidError, NotFoundError."""
    with database.read() as session:
        campaign = find_campaign(session, campaign_name)
        for number, row in enumerate(rows, start=1):
            _check_fits(row, campaign, number)
    report = ImportReport()
    for batch in _batches(rows):
        with database.write() as session:
            campaign = find_campaign(session, campaign_name)
            for row in batch:
                report = report.plus(_import_row(session, campaign, row, now))
    return report


def _batches(rows: Sequence[TaskRow]) -> list[Sequence[TaskRow]]:
    return [rows[start : start + ROWS_PER_TRANSACTION] for start in range(0, len(rows), ROWS_PER_TRANSACTION)]


def _check_fits(row: TaskRow, campaign: Campaign, number: int) -> None:
    where = f"row {number}"
    if campaign.kind == Kind.DEMONSTRATION:
        if row.answers:
            raise InvalidError(where, "a demonstration campaign takes prompts, and answers as `completion`")
        return
    if row.verdict is not None and not row.answers:
        raise InvalidError(where, f"a {campaign.kind} campaign takes prompts with responses, not demonstrations")
    if not row.answers and not campaign.sources:
        raise InvalidError(where, "has no responses, and the campaign has no source that would write some")
    if row.answers and campaign.kind == Kind.COMPARISON:
        versions = {answer.version for answer in row.answers}
        if len(row.answers) != 2 or len(versions) != 2:
            raise InvalidError(where, "a comparison takes two responses of two different versions")


def _import_row(session: Session, campaign: Campaign, row: TaskRow, now: datetime) -> ImportReport:
    task, is_new = _find_or_add(session, campaign, row, now)
    if row.verdict is None:
        return ImportReport(tasks=int(is_new), repeated=int(not is_new))
    added = _add_judgment(session, campaign, task, row, row.verdict, now)
    return ImportReport(tasks=int(is_new), judgments=int(added), repeated=int(not is_new and not added))


def _find_or_add(session: Session, campaign: Campaign, row: TaskRow, now: datetime) -> tuple[Task, bool]:
    digest = row.prompt.digest(answer.text for answer in row.answers)
    for key in _keys(row, digest):
        task = session.scalar(
            select(Task).where(Task.campaign_id == campaign.id, Task.key == key).options(selectinload(Task.responses))
        )
        if task is None:
            return _add_task(session, campaign, row, key, now), True
        if _holds(task, row):
            return task, False
    raise AssertionError("a key with the content's digest belongs to that content")


def _keys(row: TaskRow, digest: str) -> tuple[str, ...]:
    """The row's own name for its task; where another prompt or other responses have that name, it and the digest."""
    return (row.task[:160], f"{row.task[:160]}#{digest}") if row.task else (digest,)


def _holds(task: Task, row: TaskRow) -> bool:
    if task.prompt != row.prompt.to_json():
        return False
    return not row.answers or sorted(r.text for r in task.responses) == sorted(a.text for a in row.answers)


def _add_task(session: Session, campaign: Campaign, row: TaskRow, key: str, now: datetime) -> Task:
    last = session.scalar(select(func.max(Task.position)).where(Task.campaign_id == campaign.id))
    needs_answers = campaign.kind != Kind.DEMONSTRATION and not row.answers
    task = Task(
        campaign_id=campaign.id,
        key=key,
        position=0 if last is None else last + 1,
        prompt=row.prompt.to_json(),
        state=TaskState.FILLING if needs_answers else TaskState.READY,
        judgment_count=0,
        created_at=now,
        responses=[
            Response(position=i, text=answer.text, ended=answer.ended, version=answer.version)
            for i, answer in enumerate(row.answers)
        ],
    )
    if campaign.kind == Kind.COMPARISON and row.answers and row.answers[0].text == row.answers[1].text:
        task.state = TaskState.IDENTICAL
    session.add(task)
    session.flush()
    return task


def _add_judgment(
    session: Session, campaign: Campaign, task: Task, row: TaskRow, verdict: Verdict, now: datetime
) -> bool:
    labeler = imported_labeler(session, verdict.labeler or UNNAMED, now)
    there = session.scalar(
        select(Judgment.id).where(
            Judgment.task_id == task.id,
            Judgment.labeler_id == labeler.id,
            Judgment.is_adjudication == verdict.is_adjudication,
        )
    )
    if there is not None:
        return False
    count = len(row.answers)
    places = _places(task, row)
    verdict = replace(
        verdict,
        ratings=verdict.ratings or (None,) * count,
        flags=verdict.flags or ((),) * count,
        notes=verdict.notes or ("",) * count,
        order_shown=verdict.order_shown or tuple(range(count)),
    )
    at = verdict.submitted_at or now
    session.add(
        Judgment(
            task_id=task.id,
            labeler_id=labeler.id,
            order=[places.index(position) for position in verdict.order_shown],
            ranks=close_gaps([verdict.ranks[place] for place in places]),
            ratings=[verdict.ratings[place] for place in places],
            flags=[list(verdict.flags[place]) for place in places],
            notes=[verdict.notes[place] for place in places],
            note=verdict.note,
            answer=verdict.answer,
            is_adjudication=verdict.is_adjudication,
            is_imported=True,
            seconds=verdict.seconds,
            started_at=verdict.started_at or at,
            submitted_at=at,
            revised_at=at,
            revision=1,
        )
    )
    task.judgment_count += 0 if verdict.is_adjudication else 1
    session.flush()
    return True


def _places(task: Task, row: TaskRow) -> list[int]:
    """For each stored response where the row has it: rows may give one task's responses in different orders."""
    left = list(range(len(row.answers)))
    places = []
    for response in task.responses if row.answers else ():
        place = next(i for i in left if row.answers[i].text == response.text)
        left.remove(place)
        places.append(place)
    return places
