"""The labeler's pages: which campaigns there are, the guideline, the task, one's own past work."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from trimtab.labeling.campaigns import find_campaign
from trimtab.labeling.errors import NotFoundError
from trimtab.labeling.judgments import find_judgment, median_seconds, past_judgments, submit
from trimtab.labeling.labelers import new_secret
from trimtab.labeling.leases import held_lease, judged_count, next_task, skip_task
from trimtab.labeling.prompts import Prompt
from trimtab.labeling.reports import progress
from trimtab.labeling.tables import Campaign, Judgment, Task
from trimtab.labeling.vocabulary import Ask, CampaignState, Kind, Role
from trimtab.labeling.web.pages import page
from trimtab.labeling.web.room import Posted, Visit, Visiting
from trimtab.labeling.web.task_view import TaskView, draft_of, task_view

router = APIRouter(include_in_schema=False)
PAST_PER_PAGE = 50
TEMPLATES = {Kind.RANKING: "rank.html", Kind.COMPARISON: "compare.html", Kind.DEMONSTRATION: "demonstrate.html"}


@dataclass(frozen=True)
class OwnWork:
    """A labeler's part in a campaign. `share` is of what they may still do themselves: their quota, or all tasks."""

    done: int
    target: int
    median_s: float | None

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.target) if self.target else 0.0


@router.get("/")
def home(request: Request, visiting: Visiting) -> HTMLResponse:
    """All open campaigns with the labeler's own part in them."""
    with visiting.database.read() as session:
        campaigns = session.scalars(
            select(Campaign).where(Campaign.state == CampaignState.OPEN).order_by(Campaign.created_at.desc())
        ).all()
        shown = [
            (campaign, own_work(session, campaign, visiting), progress(session, campaign, visiting.now))
            for campaign in campaigns
        ]
    return page(request, "home.html", visiting, campaigns=shown)


@router.get("/c/{name}")
def campaign_page(request: Request, visiting: Visiting, name: str) -> HTMLResponse:
    """The guideline, and where the labeler stands."""
    with visiting.database.read() as session:
        campaign = find_campaign(session, name)
        own = own_work(session, campaign, visiting)
    return page(request, "campaign.html", visiting, campaign=campaign, own=own)


@router.get("/c/{name}/next")
def next_page(request: Request, visiting: Visiting, name: str) -> Response:
    """The next task, or the page that says that there is none."""
    with visiting.database.write() as session:
        campaign = find_campaign(session, name)
        lease = next_task(session, campaign, visiting.labeler, visiting.now)
    with visiting.database.read() as session:  # outside of the transaction, in which nobody else can write
        if lease is not None:
            task, campaign, order, _ = _own_task(session, visiting, lease.task_id, adjudicate=False)
            return _task_page(request, visiting, session, campaign, task_view(task, order, None, key=new_secret()))
        own = own_work(session, campaign, visiting)
        state = progress(session, campaign, visiting.now)
    return page(request, "nothing_left.html", visiting, campaign=campaign, own=own, progress=state)


@router.get("/c/{name}/mine")
def past_page(request: Request, visiting: Visiting, name: str, start: int = 0) -> HTMLResponse:
    """What the labeler said before; each can be opened again."""
    start = max(0, start)
    with visiting.database.read() as session:
        campaign = find_campaign(session, name)
        own = own_work(session, campaign, visiting)
        past = past_judgments(session, visiting.labeler, campaign, limit=PAST_PER_PAGE + 1, offset=start)
    rows = [(judgment, Prompt.from_json(judgment.task.prompt).first_words()) for judgment in past[:PAST_PER_PAGE]]
    following = start + PAST_PER_PAGE if len(past) > PAST_PER_PAGE else None
    previous = max(0, start - PAST_PER_PAGE) if start else None
    values = {"campaign": campaign, "own": own, "past": rows, "previous": previous, "following": following}
    return page(request, "past.html", visiting, **values)


@router.get("/t/{task_id}")
def task_page(request: Request, visiting: Visiting, task_id: int, adjudicate: bool = False) -> HTMLResponse:
    """A task that the labeler holds or has judged, to look at and to save again."""
    with visiting.database.read() as session:
        task, campaign, order, judgment = _own_task(session, visiting, task_id, adjudicate)
        view = task_view(task, order, judgment, key=new_secret(), adjudication=adjudicate)
        return _task_page(request, visiting, session, campaign, view)


@router.post("/t/{task_id}")
def save(request: Request, visiting: Visiting, form: Posted, task_id: int) -> Response:
    """Save a task page. Answers JSON to the page's script, a redirect to a plain form; on the disk either way."""
    adjudicate = form.text("adjudicate") == "1"
    if adjudicate:
        visiting.require(Role.LEAD)
    with visiting.database.read() as session:
        _, campaign, order, judged = _own_task(session, visiting, task_id, adjudicate)
    draft = draft_of(form, campaign, len(order))
    with visiting.database.write() as session:
        receipt = submit(session, task_id, visiting.labeler, draft, visiting.now, adjudicate=adjudicate)
    following = _after(campaign, task_id, adjudicate=adjudicate, was_edit=judged is not None)
    if _wants_json(request):
        return JSONResponse({"next": following, "revision": receipt.revision})
    return RedirectResponse(following, 303)


@router.post("/t/{task_id}/skip")
def skip(request: Request, visiting: Visiting, form: Posted, task_id: int) -> Response:
    """Pass the task over with a reason."""
    reason = ": ".join(part for part in (form.text("reason"), form.text("reason_text").strip()) if part)
    with visiting.database.write() as session:
        skip_task(session, task_id, visiting.labeler, reason, visiting.now)
        task = session.get_one(Task, task_id)
        name = session.get_one(Campaign, task.campaign_id).name
    following = f"/c/{name}/next"
    return JSONResponse({"next": following}) if _wants_json(request) else RedirectResponse(following, 303)


def own_work(session: Session, campaign: Campaign, visiting: Visit) -> OwnWork:
    """The labeler's part in a campaign."""
    done = judged_count(session, campaign, visiting.labeler)
    state = progress(session, campaign, visiting.now)
    ready = state.tasks - state.filling - state.identical
    target = min(campaign.quota, ready) if campaign.quota is not None else ready
    return OwnWork(done, max(target, done), median_seconds(session, visiting.labeler, campaign))


def _own_task(
    session: Session, visiting: Visit, task_id: int, adjudicate: bool
) -> tuple[Task, Campaign, list[int], Judgment | None]:
    if adjudicate:
        visiting.require(Role.LEAD)
    judgment = find_judgment(session, task_id, visiting.labeler, adjudication=adjudicate)
    lease = held_lease(session, task_id, visiting.labeler)
    if judgment is not None:
        task, order = judgment.task, judgment.order
    elif lease is not None:
        task, order = lease.task, lease.order
    else:
        raise NotFoundError("this task is not in your hands")
    return task, session.get_one(Campaign, task.campaign_id), list(order), judgment


def _task_page(request: Request, visiting: Visit, session: Session, campaign: Campaign, view: TaskView) -> HTMLResponse:
    values = {
        "campaign": campaign,
        "task": view,
        "own": own_work(session, campaign, visiting),
        "ask_ratings": campaign.ratings != Ask.OFF,
        "require_ratings": campaign.ratings == Ask.REQUIRED,
        "ask_flags": campaign.ask_flags,
    }
    return page(request, TEMPLATES[Kind(campaign.kind)], visiting, **values)


def _after(campaign: Campaign, task_id: int, *, adjudicate: bool, was_edit: bool) -> str:
    if adjudicate:
        return f"/lead/c/{campaign.name}/t/{task_id}"
    return f"/c/{campaign.name}/mine" if was_edit else f"/c/{campaign.name}/next"


def _wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "")
