"""What a lead sees of a campaign: the queue, each labeler's work, agreement, and where people disagree."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median

from sqlalchemy import func, select
from sqlalchemy.orm import Session, selectinload

from trimtab.labeling.agreement import Agreement, Judged, PairCounts, agreement, disagreement
from trimtab.labeling.prompts import Prompt
from trimtab.labeling.tables import Campaign, Judgment, Labeler, Lease, Skip, Task
from trimtab.labeling.vocabulary import Kind, TaskState


@dataclass(frozen=True)
class Progress:
    """How far a campaign is.

    Attributes:
        tasks: all of them; `filling` still wait for responses, `identical` need nobody.
        finished: tasks that as many people judged as the overlap asks; `waiting` have places that nobody holds.
        in_hands: leases that run now.
        judgments, wanted: what people said (without adjudications), and what the overlap asks in all.
        last_hour: judgments of the last hour.
    """

    tasks: int
    filling: int
    identical: int
    finished: int
    waiting: int
    in_hands: int
    judgments: int
    wanted: int
    skips: int
    last_hour: int

    @property
    def share(self) -> float:
        return min(1.0, self.judgments / self.wanted) if self.wanted else 0.0

    @property
    def hours_left(self) -> float | None:
        """At the pace of the last hour; None where nobody worked in it or nothing is left."""
        left = self.wanted - self.judgments
        return left / self.last_hour if self.last_hour and left > 0 else None


@dataclass(frozen=True)
class LabelerWork:
    """One labeler's part in a campaign."""

    name: str
    judgments: int
    skips: int
    median_s: float | None
    last_at: datetime | None
    agreement: PairCounts


@dataclass(frozen=True)
class Disagreement:
    """A task on which people disagree; `distance` is 0 for equal rankings, 1 for reversed ones."""

    task_id: int
    first_words: str
    distance: float
    labelers: tuple[str, ...]
    is_adjudicated: bool


def progress(session: Session, campaign: Campaign, now: datetime) -> Progress:
    """The state of a campaign's queue."""
    of_campaign = Task.campaign_id == campaign.id
    states = dict(
        session.execute(select(Task.state, func.count()).where(of_campaign).group_by(Task.state)).tuples().all()
    )
    ready = (of_campaign, Task.state == TaskState.READY)
    finished = session.scalar(
        select(func.count()).select_from(Task).where(*ready, Task.judgment_count >= campaign.overlap)
    )
    judgments = session.scalar(select(func.coalesce(func.sum(Task.judgment_count), 0)).where(of_campaign))
    held = select(Lease.task_id, func.count().label("count")).where(Lease.expires_at > now).group_by(Lease.task_id)
    leases = held.subquery()
    held_count = func.coalesce(leases.c.count, 0)
    waiting = session.scalar(
        select(func.count())
        .select_from(Task)
        .outerjoin(leases, leases.c.task_id == Task.id)
        .where(*ready, Task.judgment_count + held_count < campaign.overlap)
    )
    in_hands = session.scalar(
        select(func.count()).select_from(Lease).join(Task).where(of_campaign, Lease.expires_at > now)
    )
    skips = session.scalar(select(func.count()).select_from(Skip).join(Task).where(of_campaign))
    recent = session.scalar(
        select(func.count())
        .select_from(Judgment)
        .join(Task, Judgment.task_id == Task.id)
        .where(of_campaign, ~Judgment.is_adjudication, Judgment.submitted_at > now - timedelta(hours=1))
    )
    return Progress(
        tasks=sum(states.values()),
        filling=states.get(TaskState.FILLING, 0),
        identical=states.get(TaskState.IDENTICAL, 0),
        finished=finished or 0,
        waiting=waiting or 0,
        in_hands=in_hands or 0,
        judgments=judgments or 0,
        wanted=states.get(TaskState.READY, 0) * campaign.overlap,
        skips=skips or 0,
        last_hour=recent or 0,
    )


def judged(session: Session, campaign: Campaign) -> list[Judged]:
    """All rankings of a campaign but the adjudications, as `agreement` takes them."""
    if campaign.kind == Kind.DEMONSTRATION:
        return []
    query = (
        select(Judgment.task_id, Labeler.name, Judgment.ranks, Judgment.ratings)
        .join(Labeler, Judgment.labeler_id == Labeler.id)
        .join(Task, Judgment.task_id == Task.id)
        .where(Task.campaign_id == campaign.id, ~Judgment.is_adjudication)
    )
    return [Judged(task, name, tuple(ranks), tuple(ratings)) for task, name, ranks, ratings in session.execute(query)]


def campaign_agreement(session: Session, campaign: Campaign) -> Agreement:
    """How far the labelers of a campaign agree."""
    return agreement(judged(session, campaign))


def labeler_work(session: Session, campaign: Campaign, agreed: Agreement) -> list[LabelerWork]:
    """Each labeler's part, the busiest first."""
    rows = session.execute(
        select(Labeler.name, Judgment.seconds, Judgment.submitted_at)
        .join(Labeler, Judgment.labeler_id == Labeler.id)
        .join(Task, Judgment.task_id == Task.id)
        .where(Task.campaign_id == campaign.id, ~Judgment.is_adjudication)
    ).all()
    skips = dict(
        session.execute(
            select(Labeler.name, func.count())
            .select_from(Skip)
            .join(Labeler, Skip.labeler_id == Labeler.id)
            .join(Task, Skip.task_id == Task.id)
            .where(Task.campaign_id == campaign.id)
            .group_by(Labeler.name)
        )
        .tuples()
        .all()
    )
    seconds: dict[str, list[float]] = defaultdict(list)
    last: dict[str, datetime] = {}
    for name, spent, at in rows:
        seconds[name].append(spent)
        last[name] = max(at, last.get(name, at))
    work = [
        LabelerWork(
            name=name,
            judgments=len(seconds[name]),
            skips=skips.get(name, 0),
            median_s=median(timed) if (timed := [s for s in seconds[name] if s > 0]) else None,
            last_at=last.get(name),
            agreement=agreed.by_labeler.get(name, PairCounts()),
        )
        for name in {*seconds, *skips}
    ]
    return sorted(work, key=lambda one: (-one.judgments, one.name))


def disagreements(session: Session, campaign: Campaign, *, limit: int = 50) -> list[Disagreement]:
    """The tasks with the least agreement, the worst first; equal rankings are left out."""
    groups: dict[int, list[Judged]] = defaultdict(list)
    for one in judged(session, campaign):
        groups[one.task].append(one)  # type: ignore[index]
    distances = {task_id: disagreement(group) for task_id, group in groups.items() if len(group) > 1}
    worst = sorted((d for d in distances.items() if d[1] > 0), key=lambda item: (-item[1], item[0]))[:limit]
    tasks = {
        task.id: task for task in session.scalars(select(Task).where(Task.id.in_([task_id for task_id, _ in worst])))
    }
    decided = set(
        session.scalars(select(Judgment.task_id).where(Judgment.task_id.in_(tasks), Judgment.is_adjudication))
    )
    return [
        Disagreement(
            task_id=task_id,
            first_words=Prompt.from_json(tasks[task_id].prompt).first_words(),
            distance=distance,
            labelers=tuple(sorted(one.labeler for one in groups[task_id])),
            is_adjudicated=task_id in decided,
        )
        for task_id, distance in worst
    ]


def task_judgments(session: Session, task_id: int) -> list[Judgment]:
    """All judgments of one task, adjudications last."""
    query = (
        select(Judgment)
        .where(Judgment.task_id == task_id)
        .order_by(Judgment.is_adjudication, Judgment.submitted_at)
        .options(selectinload(Judgment.labeler), selectinload(Judgment.task).selectinload(Task.responses))
    )
    return list(session.scalars(query))
