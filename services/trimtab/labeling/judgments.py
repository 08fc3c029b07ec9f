"""Saving what people say: checked, idempotent by the client's key, durable when the transaction returns.

A client sends everything in the order that it was shown; here it is turned into the order of `Response.position`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session, selectinload

from trimtab.labeling.errors import ConflictError, InvalidError, NotFoundError
from trimtab.labeling.leases import held_lease
from trimtab.labeling.tables import Campaign, Judgment, Labeler, Skip, Submission, Task
from trimtab.labeling.vocabulary import FLAGS, HIGHEST_RATING, LOWEST_RATING, Ask, Kind

Value = TypeVar("Value")
LONGEST_NOTE = 10_000
LONGEST_ANSWER = 200_000
LONGEST_TASK_S = 24 * 3600


@dataclass(frozen=True)
class Draft:
    """What a client sends. Lists have one element a response, in the order shown; () where it was not asked.

    Attributes:
        key: chosen by the client, the same when it sends the same again.
        ranks: 1 is best, equal ranks tie; gaps are closed.
        ratings: 1 to 7, None where not given.
        answer: a demonstration's text.
        seconds: how long the labeler looked at the task.
    """

    key: str
    ranks: tuple[int, ...] = ()
    ratings: tuple[int | None, ...] = ()
    flags: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    note: str = ""
    answer: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Receipt:
    """The acknowledgement of a save: the judgment, and how often it has been saved."""

    judgment_id: int
    task_id: int
    revision: int


def submit(
    session: Session, task_id: int, labeler: Labeler, draft: Draft, now: datetime, *, adjudicate: bool = False
) -> Receipt:
    """Save what a labeler says of a task that was handed to them, or say anew what they said before.

    A late one is taken as well: the lease may have expired. The same key with the same content again changes nothing
    and gets the same receipt; with other content it is a ConflictError. InvalidError names what is missing or wrong.
    """
    task = session.scalar(
        select(Task).where(Task.id == task_id).with_for_update().options(selectinload(Task.responses))
    )
    if task is None:
        raise NotFoundError("there is no such task")
    content = _content(draft)
    if (earlier := _receipt(session, task_id, labeler, draft.key, content)) is not None:
        return earlier
    judgment = find_judgment(session, task_id, labeler, adjudication=adjudicate)
    lease = held_lease(session, task_id, labeler)
    if lease is None and judgment is None:
        raise NotFoundError("this task was not handed to you")
    campaign = session.get_one(Campaign, task.campaign_id)
    order: list[int] = judgment.order if judgment is not None else lease.order  # type: ignore[union-attr]
    _check(draft, campaign, len(order))
    if judgment is None:
        judgment = Judgment(
            task_id=task_id,
            labeler_id=labeler.id,
            order=order,
            is_adjudication=adjudicate,
            is_imported=False,
            started_at=lease.granted_at if lease is not None else now,
            submitted_at=now,
            revision=0,
            seconds=0.0,
        )
        session.add(judgment)
        task.judgment_count += 0 if adjudicate else 1
    count = len(order)
    judgment.ranks = close_gaps(_by_position(draft.ranks, order)) if campaign.kind != Kind.DEMONSTRATION else []
    judgment.ratings = _by_position(draft.ratings or (None,) * count, order)
    judgment.flags = [sorted(flags, key=FLAGS.index) for flags in _by_position(draft.flags or ((),) * count, order)]
    judgment.notes = _by_position(_clean(draft.notes) or ("",) * count, order)
    judgment.note, judgment.answer = draft.note.replace("\x00", ""), draft.answer.replace("\x00", "")
    judgment.seconds += min(max(draft.seconds, 0.0), LONGEST_TASK_S)
    judgment.revision += 1
    judgment.revised_at = now
    if lease is not None:
        session.delete(lease)
    session.execute(delete(Skip).where(Skip.task_id == task_id, Skip.labeler_id == labeler.id))
    session.flush()
    session.add(
        Submission(key=draft.key, judgment_id=judgment.id, revision=judgment.revision, content=content, received_at=now)
    )
    session.flush()
    return Receipt(judgment.id, task_id, judgment.revision)


def find_judgment(session: Session, task_id: int, labeler: Labeler, *, adjudication: bool = False) -> Judgment | None:
    """What a labeler has said of a task."""
    return session.scalar(
        select(Judgment)
        .where(
            Judgment.task_id == task_id,
            Judgment.labeler_id == labeler.id,
            Judgment.is_adjudication == adjudication,
        )
        .options(selectinload(Judgment.task).selectinload(Task.responses))
    )


def past_judgments(
    session: Session, labeler: Labeler, campaign: Campaign, *, limit: int = 50, offset: int = 0
) -> list[Judgment]:
    """What a labeler has said in a campaign, the last first."""
    query = (
        select(Judgment)
        .join(Task, Judgment.task_id == Task.id)
        .where(Judgment.labeler_id == labeler.id, Task.campaign_id == campaign.id)
        .order_by(Judgment.submitted_at.desc(), Judgment.id.desc())
        .options(selectinload(Judgment.task))
    )
    return list(session.scalars(query.limit(limit).offset(offset)))


def median_seconds(session: Session, labeler: Labeler, campaign: Campaign, last: int = 20) -> float | None:
    """The labeler's pace: the median time of their last judgments; None before the first."""
    times = sorted(
        judgment.seconds
        for judgment in past_judgments(session, labeler, campaign, limit=last)
        if not judgment.is_imported and judgment.seconds > 0
    )
    return times[len(times) // 2] if times else None


def close_gaps(ranks: Sequence[int]) -> list[int]:
    """[2, 5, 5, 9] → [1, 2, 2, 3]: the same order and ties, without empty ranks."""
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)), start=1)}
    return [places[rank] for rank in ranks]


def shown(values: Sequence[Value], order: Sequence[int]) -> list[Value]:
    """A stored list in the order that the labeler saw."""
    return [values[position] for position in order]


def submission_count(session: Session) -> int:
    """How many saves have been acknowledged, in all."""
    return session.scalar(select(func.count()).select_from(Submission)) or 0


def _by_position(values: Sequence[Value], order: Sequence[int]) -> list[Value]:
    placed = dict(zip(order, values, strict=True))
    return [placed[position] for position in range(len(order))]


def _receipt(session: Session, task_id: int, labeler: Labeler, key: str, content: dict[str, Any]) -> Receipt | None:
    saved = session.get(Submission, key)
    if saved is None:
        return None
    judgment = session.get_one(Judgment, saved.judgment_id)
    if (judgment.task_id, judgment.labeler_id) != (task_id, labeler.id) or saved.content != content:
        raise ConflictError("this key was used for another submission: choose a new one for each")
    return Receipt(judgment.id, task_id, saved.revision)


def _content(draft: Draft) -> dict[str, Any]:
    """The draft as JSON gives it back (lists for tuples), without its key and its clock."""
    fields = {key: value for key, value in asdict(draft).items() if key not in ("key", "seconds")}
    return {key: _listed(value) for key, value in fields.items() if value not in ((), "")}


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple | list) else value


def _clean(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(note.replace("\x00", "").strip() for note in notes)


def _check(draft: Draft, campaign: Campaign, count: int) -> None:
    if not 8 <= len(draft.key) <= 64:
        raise InvalidError("key", "8 to 64 characters, chosen anew for each submission")
    if len(draft.note) > LONGEST_NOTE or any(len(note) > LONGEST_NOTE for note in draft.notes):
        raise InvalidError("note", f"at most {LONGEST_NOTE:,} characters")
    if campaign.kind == Kind.DEMONSTRATION:
        if not draft.answer.strip():
            raise InvalidError("answer", "is empty")
        if len(draft.answer) > LONGEST_ANSWER:
            raise InvalidError("answer", f"at most {LONGEST_ANSWER:,} characters")
        return
    for name in ("ranks", "ratings", "flags", "notes"):
        values = getattr(draft, name)
        if len(values) != count and (values or name == "ranks"):
            raise InvalidError(name, f"one for each of the {count} responses, found {len(values)}")
    for i, rank in enumerate(draft.ranks):
        if not 1 <= rank <= count:
            raise InvalidError(f"ranks[{i}]", f"a rank from 1 (best) to {count}, found {rank}")
    _check_marks(draft, campaign, count)


def _check_marks(draft: Draft, campaign: Campaign, count: int) -> None:
    asked = campaign.ratings == Ask.REQUIRED and campaign.kind == Kind.RANKING
    for i in range(count):
        rating = draft.ratings[i] if draft.ratings else None
        if rating is None and asked:
            raise InvalidError(f"ratings[{i}]", "this campaign asks for a rating of each response")
        if rating is not None and not LOWEST_RATING <= rating <= HIGHEST_RATING:
            raise InvalidError(f"ratings[{i}]", f"{LOWEST_RATING} to {HIGHEST_RATING}, found {rating}")
        flags = draft.flags[i] if draft.flags else ()
        if len(set(flags)) != len(flags) or not set(flags) <= set(FLAGS):
            raise InvalidError(f"flags[{i}]", f"any of {', '.join(FLAGS)}, each once")
