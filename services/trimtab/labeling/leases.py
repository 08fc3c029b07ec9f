"""Which task a labeler gets next. A lease keeps others away from it; it expires, and survives restarts.

With an overlap of n, n people hold or have judged a task at most. Two servers on one PostgreSQL database never lease
one task too often: the task's row is locked while its places are counted.
"""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Select, delete, func, select
from sqlalchemy.orm import Session, selectinload

from trimtab.labeling.errors import ConflictError, InvalidError, NotFoundError
from trimtab.labeling.tables import Campaign, Judgment, Labeler, Lease, Response, Skip, Task
from trimtab.labeling.vocabulary import CampaignState, Kind, TaskState

_shuffler = secrets.SystemRandom()


def next_task(session: Session, campaign: Campaign, labeler: Labeler, now: datetime) -> Lease | None:
    """The labeler's next task, leased to them: the one already in their hands, else the first that needs somebody.

    None where nothing is left for this person: all judged, all leased to others, the quota reached, or closed.
    """
    if campaign.state != CampaignState.OPEN:
        return None
    held = session.scalar(
        select(Lease)
        .join(Task, Lease.task_id == Task.id)
        .where(Lease.labeler_id == labeler.id, Task.campaign_id == campaign.id, Lease.expires_at > now)
        .order_by(Lease.granted_at, Lease.id)
        .limit(1)
    )
    if held is not None:
        held.expires_at = now + timedelta(seconds=campaign.lease_s)
        return held
    if campaign.quota is not None and judged_count(session, campaign, labeler) >= campaign.quota:
        return None
    for _ in range(20):  # another server may fill a task's last place between the search and the lock
        task = session.scalar(_open_tasks(campaign, labeler, now).limit(1))
        if task is None:
            return None
        if _has_place(session, task, campaign, labeler, now):
            return _grant(session, task, campaign, labeler, now)
    return None


def lease_for_adjudication(session: Session, task_id: int, lead: Labeler, now: datetime) -> Lease:
    """A task with an order for a lead who decides between others. It keeps nobody away: it has expired already."""
    task = session.get(Task, task_id)
    if task is None or task.state != TaskState.READY:
        raise NotFoundError("there is no such task")
    lease = held_lease(session, task_id, lead)
    return lease or _grant(session, task, session.get_one(Campaign, task.campaign_id), lead, now, lease_s=0)


def renew(session: Session, task_id: int, labeler: Labeler, now: datetime) -> datetime:
    """Keep a task longer: the page says now and then that somebody still works. Returns when the lease expires.

    ConflictError where it has expired and others have taken the places meanwhile; a ranking is taken all the same.
    """
    lease = held_lease(session, task_id, labeler)
    if lease is None:
        raise NotFoundError("this task was not handed to you")
    task = session.get_one(Task, task_id)
    campaign = session.get_one(Campaign, task.campaign_id)
    if lease.expires_at <= now and not _has_place(session, task, campaign, labeler, now):
        raise ConflictError("the lease has expired, and others have taken the task")
    lease.expires_at = now + timedelta(seconds=campaign.lease_s)
    return lease.expires_at


def skip_task(session: Session, task_id: int, labeler: Labeler, reason: str, now: datetime) -> None:
    """Pass a task over for good, with a reason; it goes to somebody else. Skipping twice is one skip."""
    reason = reason.replace("\x00", "").strip()
    if not reason:
        raise InvalidError("reason", "say why")
    if len(reason) > 1000:
        raise InvalidError("reason", "at most 1,000 characters")
    skipped = select(Skip.id).where(Skip.task_id == task_id, Skip.labeler_id == labeler.id)
    if session.scalar(skipped) is not None:
        return
    lease = held_lease(session, task_id, labeler)
    if lease is None:
        raise NotFoundError("this task was not handed to you")
    session.delete(lease)
    session.add(Skip(task_id=task_id, labeler_id=labeler.id, reason=reason, skipped_at=now))
    session.flush()


def unskip_task(session: Session, task_id: int, labeler: Labeler) -> None:
    """Take a skip back: the task may come again."""
    session.execute(delete(Skip).where(Skip.task_id == task_id, Skip.labeler_id == labeler.id))


def held_lease(session: Session, task_id: int, labeler: Labeler) -> Lease | None:
    """The labeler's lease on a task, expired or not."""
    return session.scalar(
        select(Lease)
        .where(Lease.task_id == task_id, Lease.labeler_id == labeler.id)
        .options(selectinload(Lease.task).selectinload(Task.responses))
    )


def judged_count(session: Session, campaign: Campaign, labeler: Labeler) -> int:
    """How many tasks of a campaign a labeler has judged; adjudications do not count."""
    counted = (
        select(func.count())
        .select_from(Judgment)
        .join(Task, Judgment.task_id == Task.id)
        .where(Task.campaign_id == campaign.id, Judgment.labeler_id == labeler.id, ~Judgment.is_adjudication)
    )
    return session.scalar(counted) or 0


def _open_tasks(campaign: Campaign, labeler: Labeler, now: datetime) -> Select[Task]:
    others = (
        select(func.count())
        .where(Lease.task_id == Task.id, Lease.labeler_id != labeler.id, Lease.expires_at > now)
        .scalar_subquery()
    )
    return (
        select(Task)
        .where(
            Task.campaign_id == campaign.id,
            Task.state == TaskState.READY,
            Task.judgment_count < campaign.overlap,
            ~_judged_by(labeler),
            ~_skipped_by(labeler),
            Task.judgment_count + others < campaign.overlap,
        )
        .order_by(Task.position, Task.id)
        .with_for_update(skip_locked=True, of=Task)
    )


def _judged_by(labeler: Labeler) -> ColumnElement[bool]:
    return select(Judgment.id).where(Judgment.task_id == Task.id, Judgment.labeler_id == labeler.id).exists()


def _skipped_by(labeler: Labeler) -> ColumnElement[bool]:
    return select(Skip.id).where(Skip.task_id == Task.id, Skip.labeler_id == labeler.id).exists()


def _has_place(session: Session, task: Task, campaign: Campaign, labeler: Labeler, now: datetime) -> bool:
    """Whether one more person may take the task, counted anew: the caller holds the task's lock."""
    session.refresh(task, ["judgment_count"])
    others = session.scalar(
        select(func.count())
        .select_from(Lease)
        .where(Lease.task_id == task.id, Lease.labeler_id != labeler.id, Lease.expires_at > now)
    )
    return task.judgment_count + (others or 0) < campaign.overlap


def _grant(
    session: Session, task: Task, campaign: Campaign, labeler: Labeler, now: datetime, *, lease_s: int | None = None
) -> Lease:
    expires_at = now + timedelta(seconds=campaign.lease_s if lease_s is None else lease_s)
    lease = session.scalar(select(Lease).where(Lease.task_id == task.id, Lease.labeler_id == labeler.id))
    if lease is not None:
        lease.granted_at, lease.expires_at = now, expires_at
        return lease
    positions = session.scalars(
        select(Response.position).where(Response.task_id == task.id).order_by(Response.position)
    )
    order = list(positions) if campaign.kind != Kind.DEMONSTRATION else []
    _shuffler.shuffle(order)
    lease = Lease(task_id=task.id, labeler_id=labeler.id, order=order, granted_at=now, expires_at=expires_at)
    session.add(lease)
    session.flush()
    return lease
