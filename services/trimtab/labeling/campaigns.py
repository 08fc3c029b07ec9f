"""Campaigns: what a lead asks for, checked in one place whoever asks (page, API or command)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from trimtab.labeling.errors import ConflictError, InvalidError, NotFoundError
from trimtab.labeling.tables import Campaign, Labeler
from trimtab.labeling.vocabulary import FEWEST_RESPONSES, MOST_RESPONSES, Ask, CampaignState, Kind

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MOST_SOURCES = 8
CHANGEABLE = ("title", "guideline", "overlap", "quota", "lease_s", "ratings", "ask_flags", "state")


@dataclass(frozen=True)
class Source:
    """A policy that answers the prompts: a generator's address, and which version it must serve ("" is any).

    `samples` is how many distinct answers of a task come from it.
    """

    address: str
    samples: int
    version: str = ""


@dataclass(frozen=True)
class SamplingPlan:
    """How answers are sampled; `max_tokens` 0 is the generator's default."""

    max_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class CampaignPlan:
    """All that makes a campaign.

    Attributes:
        responses_per_task: K, what sources sample for one task; imported tasks may hold 2 to 9.
        overlap: how many people judge each task.
        quota: how many tasks one person may judge; None is no limit.
        lease_s: how long a task stays in one person's hands without a sign of life.
        sources: which policies answer prompts that are imported without responses.
    """

    name: str
    title: str = ""
    kind: Kind = Kind.RANKING
    guideline: str = ""
    responses_per_task: int = 4
    overlap: int = 1
    quota: int | None = None
    lease_s: int = 1800
    ratings: Ask = Ask.OPTIONAL
    ask_flags: bool = True
    sources: tuple[Source, ...] = ()
    sampling: SamplingPlan = field(default_factory=SamplingPlan)


def create_campaign(session: Session, plan: CampaignPlan, creator: Labeler | None, now: datetime) -> Campaign:
    """A new open campaign. InvalidError names a wrong field; ConflictError where the name is taken."""
    _check(plan)
    if session.scalar(select(Campaign.id).where(Campaign.name == plan.name)) is not None:
        raise ConflictError(f"there is already a campaign named {plan.name}")
    values: dict[str, Any] = asdict(plan)
    values["sources"] = [asdict(source) for source in plan.sources]
    values["title"] = plan.title or plan.name
    values["guideline"] = plan.guideline.replace("\x00", "")
    campaign = Campaign(
        **values, state=CampaignState.OPEN, created_at=now, created_by_id=creator.id if creator else None
    )
    session.add(campaign)
    session.flush()
    return campaign


def find_campaign(session: Session, name: str) -> Campaign:
    """The campaign of that name; NotFoundError."""
    campaign = session.scalar(select(Campaign).where(Campaign.name == name))
    if campaign is None:
        raise NotFoundError(f"there is no campaign named {name}")
    return campaign


def change_campaign(session: Session, name: str, changes: dict[str, Any]) -> Campaign:
    """Change what may change while people work (`CHANGEABLE`); InvalidError for anything else."""
    campaign = find_campaign(session, name)
    for key in changes:
        if key not in CHANGEABLE:
            raise InvalidError(key, f"cannot change; these can: {', '.join(CHANGEABLE)}")
    plan = plan_of(campaign)
    merged = asdict(plan) | {key: value for key, value in changes.items() if key != "state"}
    merged |= {"sources": plan.sources, "sampling": plan.sampling}
    _check(CampaignPlan(**merged))
    for key, value in changes.items():
        setattr(campaign, key, CampaignState(value) if key == "state" else value)
    session.flush()
    return campaign


def plan_of(campaign: Campaign) -> CampaignPlan:
    """The plan that a stored campaign follows."""
    return CampaignPlan(
        name=campaign.name,
        title=campaign.title,
        kind=Kind(campaign.kind),
        guideline=campaign.guideline,
        responses_per_task=campaign.responses_per_task,
        overlap=campaign.overlap,
        quota=campaign.quota,
        lease_s=campaign.lease_s,
        ratings=Ask(campaign.ratings),
        ask_flags=campaign.ask_flags,
        sources=tuple(Source(**source) for source in campaign.sources),
        sampling=SamplingPlan(**campaign.sampling),
    )


def _check(plan: CampaignPlan) -> None:
    if not NAME.fullmatch(plan.name):
        raise InvalidError(
            "name", "1 to 64 small letters, digits, dots, dashes and underscores, a letter or digit first"
        )
    if len(plan.title) > 200:
        raise InvalidError("title", "at most 200 characters")
    _within("overlap", plan.overlap, 1, 100)
    _within("lease_s", plan.lease_s, 30, 86_400)
    if plan.quota is not None:
        _within("quota", plan.quota, 1, 1_000_000)
    if plan.kind == Kind.RANKING:
        _within("responses_per_task", plan.responses_per_task, FEWEST_RESPONSES, MOST_RESPONSES)
    _check_sources(plan)


def _check_sources(plan: CampaignPlan) -> None:
    if not plan.sources:
        return
    if plan.kind == Kind.DEMONSTRATION:
        raise InvalidError("sources", "a demonstration campaign asks people for answers, not a policy")
    if len(plan.sources) > MOST_SOURCES:
        raise InvalidError("sources", f"at most {MOST_SOURCES}")
    for i, source in enumerate(plan.sources):
        if not source.address:
            raise InvalidError(f"sources[{i}].address", "is empty; a generator's HOST:PORT")
        _within(f"sources[{i}].samples", source.samples, 1, MOST_RESPONSES)
    total = sum(source.samples for source in plan.sources)
    if plan.kind == Kind.COMPARISON and [source.samples for source in plan.sources] != [1, 1]:
        raise InvalidError("sources", "a comparison takes one answer from each of two sources")
    if plan.kind == Kind.RANKING and total != plan.responses_per_task:
        raise InvalidError(
            "sources", f"sample {total} answers in all, but responses_per_task is {plan.responses_per_task}"
        )
    if not 0 < plan.sampling.temperature <= 10:
        raise InvalidError("sampling.temperature", "above 0, at most 10: greedy answers would all be equal")
    if not 0 < plan.sampling.top_p <= 1:
        raise InvalidError("sampling.top_p", "above 0, at most 1")


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidError(name, f"a whole number from {low} to {high}, found {value}")
