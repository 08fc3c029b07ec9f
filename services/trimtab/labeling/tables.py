"""The tables: who labels, what is to be labeled, who works on what now, and what people said.

A task is one prompt with its responses. A lease hands it to one labeler, in an order of its own. A judgment is what
that labeler says now; a submission is one acknowledged save of it, kept for good, whose key makes sending it twice
harmless.
Lists of a judgment (ranks, ratings, flags) are in the order of `Response.position`, never in the order shown.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, ForeignKey, Index, MetaData, String, Text, TypeDecorator, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

NAMING = {  # migrations drop constraints by name
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, in UTC in and out. SQLite keeps no zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"a time without a zone: {value!r}")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Table(DeclarativeBase):
    """The base of all tables."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012 (SQLAlchemy's)


class Labeler(Table):
    """A person. Without a token hash nobody can sign in as them: imported rankings carry such names."""

    __tablename__ = "labelers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    token_hash: Mapped[str | None] = mapped_column(String(64), unique=True)
    language: Mapped[str | None] = mapped_column(String(8))
    created_at: Mapped[datetime]
    disabled_at: Mapped[datetime | None]


class WebSession(Table):
    """A signed-in browser; the cookie's secret is kept as a hash only."""

    __tablename__ = "web_sessions"

    id: Mapped[int] = mapped_column(primary_key=True)
    secret_hash: Mapped[str] = mapped_column(String(64), unique=True)
    csrf_token: Mapped[str] = mapped_column(String(64))
    labeler_id: Mapped[int] = mapped_column(ForeignKey("labelers.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)

    labeler: Mapped[Labeler] = relationship()


class Campaign(Table):
    """What a lead asks for. `kind` is ranking, comparison or demonstration; `state` is open or closed.

    `sources` says which policy versions answer the prompts (see `feeding`); without any, responses are imported.
    """

    __tablename__ = "campaigns"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    title: Mapped[str] = mapped_column(String(200))
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    guideline: Mapped[str] = mapped_column(Text)
    responses_per_task: Mapped[int]
    overlap: Mapped[int]
    quota: Mapped[int | None]
    lease_s: Mapped[int]
    ratings: Mapped[str] = mapped_column(String(16))
    ask_flags: Mapped[bool]
    sources: Mapped[list[Any]]
    sampling: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    created_by_id: Mapped[int | None] = mapped_column(ForeignKey("labelers.id", ondelete="SET NULL"))
    feeder: Mapped[str | None] = mapped_column(String(64))
    feeder_until: Mapped[datetime | None]
    feed_error: Mapped[str | None] = mapped_column(Text)

    tasks: Mapped[list[Task]] = relationship(back_populates="campaign", passive_deletes=True)


class Task(Table):
    """One prompt and its responses. `key` names it within its campaign: the same one is never there twice.

    `state` is filling (responses are still to come), ready, or identical (a comparison whose two answers are equal:
    a tie without asking anybody).
    """

    __tablename__ = "tasks"
    __table_args__ = (
        UniqueConstraint("campaign_id", "key"),
        Index(None, "campaign_id", "state", "position"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    campaign_id: Mapped[int] = mapped_column(ForeignKey("campaigns.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(String(200))
    position: Mapped[int]
    prompt: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    judgment_count: Mapped[int]
    created_at: Mapped[datetime]

    campaign: Mapped[Campaign] = relationship(back_populates="tasks")
    responses: Mapped[list[Response]] = relationship(
        back_populates="task", order_by="Response.position", passive_deletes=True
    )


class Response(Table):
    """One answer. `version` names the policy that wrote it and is shown to leads only; `ended` is false if cut off."""

    __tablename__ = "responses"
    __table_args__ = (UniqueConstraint("task_id", "position"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete="CASCADE"))
    position: Mapped[int]
    text: Mapped[str] = mapped_column(Text)
    ended: Mapped[bool]
    version: Mapped[str] = mapped_column(String(300))

    task: Mapped[Task] = relationship(back_populates="responses")


class Lease(Table):
    """A task in one labeler's hands. `order[i]` is the position of the response shown i-th.

    An expired one stays: its labeler's late ranking is still taken, and the same order is shown again.
    """

    __tablename__ = "leases"
    __table_args__ = (UniqueConstraint("task_id", "labeler_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete="CASCADE"))
    labeler_id: Mapped[int] = mapped_column(ForeignKey("labelers.id", ondelete="CASCADE"), index=True)
    order: Mapped[list[Any]]
    granted_at: Mapped[datetime]
    expires_at: Mapped[datetime]

    task: Mapped[Task] = relationship()


class Skip(Table):
    """A task that a labeler passed over, and why. It is not offered to them again."""

    __tablename__ = "skips"
    __table_args__ = (UniqueConstraint("task_id", "labeler_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete="CASCADE"))
    labeler_id: Mapped[int] = mapped_column(ForeignKey("labelers.id", ondelete="CASCADE"), index=True)
    reason: Mapped[str] = mapped_column(Text)
    skipped_at: Mapped[datetime]

    task: Mapped[Task] = relationship()


class Judgment(Table):
    """What one labeler says of one task now: a ranking, or for a demonstration campaign the answer they wrote.

    An adjudication is a lead's last word where others disagree; it takes none of the task's places.
    """

    __tablename__ = "judgments"
    __table_args__ = (
        UniqueConstraint("task_id", "labeler_id", "is_adjudication"),
        Index(None, "labeler_id", "submitted_at"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id", ondelete="CASCADE"))
    labeler_id: Mapped[int] = mapped_column(ForeignKey("labelers.id", ondelete="CASCADE"))
    order: Mapped[list[Any]]
    ranks: Mapped[list[Any]]
    ratings: Mapped[list[Any]]
    flags: Mapped[list[Any]]
    notes: Mapped[list[Any]]
    answer: Mapped[str] = mapped_column(Text)
    note: Mapped[str] = mapped_column(Text)
    is_adjudication: Mapped[bool]
    is_imported: Mapped[bool]
    seconds: Mapped[float]
    started_at: Mapped[datetime]
    submitted_at: Mapped[datetime]
    revised_at: Mapped[datetime]
    revision: Mapped[int]

    task: Mapped[Task] = relationship()
    labeler: Mapped[Labeler] = relationship()


class Submission(Table):
    """One acknowledged save. The client chose `key`; `content` is what it sent, in the order shown."""

    __tablename__ = "submissions"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    judgment_id: Mapped[int] = mapped_column(ForeignKey("judgments.id", ondelete="CASCADE"), index=True)
    revision: Mapped[int]
    content: Mapped[dict[str, Any]]
    received_at: Mapped[datetime]
