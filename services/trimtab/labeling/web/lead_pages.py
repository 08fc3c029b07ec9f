"""The lead's pages: all campaigns, a new one, one campaign's queue, people and agreement, one task's disagreement."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from sqlalchemy import func, select

from trimtab.labeling.agreement import Judged, compare_rankings
from trimtab.labeling.campaigns import (
    CampaignPlan,
    SamplingPlan,
    Source,
    change_campaign,
    create_campaign,
    find_campaign,
)
from trimtab.labeling.errors import InvalidError, LabelingError, NotFoundError
from trimtab.labeling.importing import import_rows
from trimtab.labeling.leases import lease_for_adjudication
from trimtab.labeling.prompts import Prompt
from trimtab.labeling.reports import campaign_agreement, disagreements, labeler_work, progress, task_judgments
from trimtab.labeling.rows import TaskRow, lines_of, read_rows
from trimtab.labeling.tables import Campaign, Judgment, Skip, Task
from trimtab.labeling.vocabulary import Ask, Kind, Role
from trimtab.labeling.web.pages import page
from trimtab.labeling.web.room import Form, Posted, Visit, Visiting
from trimtab.labeling.win_rates import win_rates

router = APIRouter(prefix="/lead", include_in_schema=False)


def _lead(visiting: Visiting) -> Visit:
    visiting.require(Role.LEAD)
    return visiting


Leading = Annotated[Visit, Depends(_lead)]


@dataclass(frozen=True)
class VersionedAnswer:
    """One answer of a task as a lead sees it, with everybody's rank of it."""

    version: str
    text: str
    ranks: tuple[int | None, ...]


@router.get("")
def overview(request: Request, visiting: Leading) -> HTMLResponse:
    """All campaigns with their queues."""
    with visiting.database.read() as session:
        campaigns = session.scalars(select(Campaign).order_by(Campaign.created_at.desc(), Campaign.id.desc())).all()
        rows = [(campaign, progress(session, campaign, visiting.now)) for campaign in campaigns]
    return page(request, "lead.html", visiting, campaigns=rows)


@router.get("/new")
def new_page(request: Request, visiting: Leading) -> HTMLResponse:
    """The form of a new campaign."""
    return _new_page(request, visiting, {}, "", "")


@router.post("/new")
def create(request: Request, visiting: Leading, form: Posted) -> Response:
    """Make a campaign; a wrong field brings the form back with what was typed and what to change."""
    typed = {key: form.text(key) for key in form.data}
    try:
        plan = _plan(form)
        rows = _rows(form)
        with visiting.database.write() as session:
            create_campaign(session, plan, visiting.labeler, visiting.now)
        if rows:
            import_rows(visiting.database, plan.name, rows, visiting.now)
    except InvalidError as error:
        return _new_page(request, visiting, typed, str(error), error.field)
    except LabelingError as error:
        return _new_page(request, visiting, typed, str(error), "")
    return RedirectResponse(f"/lead/c/{plan.name}", 303)


@router.get("/c/{name}")
def campaign_page(request: Request, visiting: Leading, name: str, imported: str = "", wrong: str = "") -> HTMLResponse:
    """One campaign: queue, people, agreement, disagreements, win rates."""
    with visiting.database.read() as session:
        campaign = find_campaign(session, name)
        agreed = campaign_agreement(session, campaign)
        reasons = session.execute(
            select(Skip.reason, func.count())
            .join(Task, Skip.task_id == Task.id)
            .where(Task.campaign_id == campaign.id)
            .group_by(Skip.reason)
            .order_by(func.count().desc())
            .limit(12)
        )
        values = {
            "progress": progress(session, campaign, visiting.now),
            "agreement": agreed,
            "work": labeler_work(session, campaign, agreed),
            "disagreements": disagreements(session, campaign),
            "win_rates": win_rates(session, campaign) if campaign.kind != Kind.DEMONSTRATION else [],
            "skips": [(reason, count) for reason, count in reasons],
        }
    messages = {"imported": imported, "wrong": wrong}
    return page(request, "lead_campaign.html", visiting, campaign=campaign, **messages, **values)


@router.post("/c/{name}/settings")
def change(visiting: Leading, form: Posted, name: str) -> Response:
    """Change what may change: overlap, quota, guideline, open or closed."""
    changes: dict[str, object] = {}
    if form.text("state"):
        changes["state"] = form.text("state")
    else:
        changes = {
            "title": form.text("title").strip() or name,
            "guideline": form.text("guideline"),
            "overlap": form.integer("overlap") or 1,
            "quota": form.integer("quota"),
        }
    with visiting.database.write() as session:
        change_campaign(session, name, changes)
    return RedirectResponse(f"/lead/c/{name}", 303)


@router.post("/c/{name}/import")
def import_file(visiting: Leading, form: Posted, name: str) -> Response:
    """Add rows of an uploaded file, or of pasted lines."""
    try:
        report = import_rows(visiting.database, name, _rows(form), visiting.now)
    except InvalidError as error:
        line = getattr(error, "line", None)
        return RedirectResponse(f"/lead/c/{name}?wrong={_quoted(f'{line}: {error}' if line else str(error))}", 303)
    return RedirectResponse(f"/lead/c/{name}?imported={report.tasks}+{report.judgments}+{report.repeated}", 303)


@router.get("/c/{name}/t/{task_id}")
def task_page(request: Request, visiting: Leading, name: str, task_id: int) -> HTMLResponse:
    """One task with everybody's ranking side by side, and which version wrote what."""
    with visiting.database.read() as session:
        campaign = find_campaign(session, name)
        task = session.get(Task, task_id)
        if task is None or task.campaign_id != campaign.id:
            raise NotFoundError("there is no such task in this campaign")
        judgments = task_judgments(session, task_id)
        answers = [
            VersionedAnswer(response.version, response.text, tuple(_rank(j, response.position) for j in judgments))
            for response in task.responses
        ]
    pairs = _disputed(judgments)
    values = {"campaign": campaign, "task": task, "prompt": Prompt.from_json(task.prompt), "judgments": judgments}
    return page(request, "lead_task.html", visiting, answers=answers, disputed=pairs, **values)


@router.post("/c/{name}/t/{task_id}/adjudicate")
def adjudicate(visiting: Leading, form: Posted, name: str, task_id: int) -> Response:
    """Open the task to decide: blind, in an order of the lead's own."""
    with visiting.database.write() as session:
        lease_for_adjudication(session, task_id, visiting.labeler, visiting.now)
    return RedirectResponse(f"/t/{task_id}?adjudicate=1", 303)


def _rank(judgment: Judgment, position: int) -> int | None:
    return judgment.ranks[position] if judgment.ranks else None


def _disputed(judgments: list[Judgment]) -> float | None:
    """The share of ordered pairs on which the people of a task agree; None where nothing can be compared."""
    said = [Judged(j.task_id, j.labeler.name, tuple(j.ranks)) for j in judgments if j.ranks and not j.is_adjudication]
    counts = [compare_rankings(a.ranks, b.ranks) for i, a in enumerate(said) for b in said[i + 1 :]]
    same, opposite = sum(c.same for c in counts), sum(c.opposite for c in counts)
    return same / (same + opposite) if same + opposite else None


def _new_page(request: Request, visiting: Visit, typed: dict[str, str], wrong: str, field: str) -> HTMLResponse:
    values = {"typed": typed, "wrong": wrong, "wrong_field": field, "kinds": list(Kind), "asks": list(Ask)}
    return page(request, "lead_new.html", visiting, status=422 if wrong else 200, **values)


def _plan(form: Form) -> CampaignPlan:
    kind = Kind(form.text("kind") or Kind.RANKING)
    sources = tuple(
        Source(address.strip(), form.integer(f"samples_{i}") or 1, form.text(f"version_{i}").strip())
        for i in (1, 2)
        if (address := form.text(f"address_{i}")).strip()
    )
    total = sum(source.samples for source in sources)
    return CampaignPlan(
        name=form.text("name").strip(),
        title=form.text("title").strip(),
        kind=kind,
        guideline=form.text("guideline"),
        responses_per_task=total if sources and kind == Kind.RANKING else 4,
        overlap=form.integer("overlap") or 1,
        quota=form.integer("quota"),
        lease_s=60 * (form.integer("lease_min") or 30),
        ratings=Ask(form.text("ratings") or Ask.OPTIONAL),
        ask_flags=form.text("ask_flags") == "1",
        sources=sources,
        sampling=SamplingPlan(max_tokens=form.integer("max_tokens") or 0),
    )


def _rows(form: Form) -> list[TaskRow]:
    """Rows of the uploaded file and of the pasted lines; a line that is no JSON is a prompt by itself."""
    pasted = [
        line if line.lstrip().startswith("{") else json.dumps({"prompt": line.rstrip("\r")}, ensure_ascii=False)
        for line in lines_of(form.text("lines"))
        if line.strip()
    ]
    return read_rows([*lines_of(form.upload("file")), *pasted])


def _quoted(message: str) -> str:
    from urllib.parse import quote

    return quote(message[:300])
