"""The REST API: everything that the pages do. `Authorization: Bearer TOKEN`, or the cookie of a signed-in browser."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import select

from trimtab.labeling.campaigns import change_campaign, create_campaign, find_campaign
from trimtab.labeling.errors import InvalidError, LabelingError
from trimtab.labeling.exporting import export_lines
from trimtab.labeling.importing import import_rows
from trimtab.labeling.judgments import shown, submit
from trimtab.labeling.labelers import (
    add_labeler,
    delete_labeler,
    disable_labeler,
    labeler_data,
    renew_token,
    set_role,
)
from trimtab.labeling.leases import held_lease, next_task, renew, skip_task
from trimtab.labeling.reports import campaign_agreement, labeler_work, progress
from trimtab.labeling.rows import lines_of, read_rows
from trimtab.labeling.tables import Campaign, Labeler
from trimtab.labeling.vocabulary import Kind, Role
from trimtab.labeling.web.room import Visit, Visiting
from trimtab.labeling.web.schemas import (
    AgreementReply,
    CampaignBody,
    CampaignChanges,
    CampaignReply,
    ImportReply,
    JudgmentBody,
    LabelerBody,
    LabelerReply,
    PairsReply,
    ProgressReply,
    ReceiptReply,
    ShownAnswer,
    SkipBody,
    TaskReply,
    TokenReply,
    WinRateReply,
    WorkReply,
)
from trimtab.labeling.win_rates import win_rates

router = APIRouter(prefix="/api/v1")
NDJSON = "application/x-ndjson"


def _lead(visiting: Visiting) -> Visit:
    visiting.require(Role.LEAD)
    return visiting


def _admin(visiting: Visiting) -> Visit:
    visiting.require(Role.ADMIN)
    return visiting


async def _lines(request: Request, visiting: Annotated[Visit, Depends(_lead)]) -> list[str]:
    """The body as lines. FastAPI would read it as JSON; rows are one JSON object a line."""
    try:
        return lines_of((await request.body()).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InvalidError("", "the body is not UTF-8 text") from None


Leading = Annotated[Visit, Depends(_lead)]
Administering = Annotated[Visit, Depends(_admin)]


@router.get("/me", tags=["labelers"])
def me(visiting: Visiting) -> LabelerReply:
    """Who the token belongs to."""
    return _labeler(visiting.labeler)


@router.get("/campaigns", tags=["campaigns"])
def list_campaigns(visiting: Visiting) -> list[CampaignReply]:
    """All campaigns, the newest first; to labelers without saying which policies answer."""
    with visiting.database.read() as session:
        found = session.scalars(select(Campaign).order_by(Campaign.created_at.desc(), Campaign.id.desc())).all()
    return [_campaign(campaign, visiting) for campaign in found]


@router.post("/campaigns", tags=["campaigns"], status_code=201)
def add_campaign(visiting: Leading, body: CampaignBody) -> CampaignReply:
    """Make a campaign. Leads only."""
    with visiting.database.write() as session:
        return CampaignReply.of(create_campaign(session, body.plan(), visiting.labeler, visiting.now))


@router.get("/campaigns/{name}", tags=["campaigns"])
def get_campaign(visiting: Visiting, name: str) -> CampaignReply:
    """One campaign."""
    with visiting.database.read() as session:
        return _campaign(find_campaign(session, name), visiting)


@router.patch("/campaigns/{name}", tags=["campaigns"])
def patch_campaign(visiting: Leading, name: str, body: CampaignChanges) -> CampaignReply:
    """Change, close or open a campaign. Leads only."""
    with visiting.database.write() as session:
        return CampaignReply.of(change_campaign(session, name, body.model_dump(exclude_unset=True)))


@router.post(
    "/campaigns/{name}/rows",
    tags=["campaigns"],
    openapi_extra={"requestBody": {"required": True, "content": {NDJSON: {"schema": {"type": "string"}}}}},
)
def add_rows(visiting: Leading, name: str, lines: Annotated[list[str], Depends(_lines)]) -> ImportReply:
    """Import JSONL: prompts, responses to rank, rankings, pairs, demonstrations. Doing it again adds nothing."""
    report = import_rows(visiting.database, name, read_rows(lines), visiting.now)
    return ImportReply(**asdict(report))


@router.get("/campaigns/{name}/rows", tags=["campaigns"], response_class=StreamingResponse)
def get_rows(visiting: Leading, name: str, resolve: bool = False) -> StreamingResponse:
    """Export JSONL, one row a judgment; with `resolve` only the adjudication where there is one. Leads only."""
    with visiting.database.read() as session:
        find_campaign(session, name)
    lines = export_lines(visiting.database, name, resolve=resolve)
    disposition = f'attachment; filename="{name}.jsonl"'
    return StreamingResponse(lines, media_type=NDJSON, headers={"Content-Disposition": disposition})


@router.get("/campaigns/{name}/progress", tags=["reports"])
def get_progress(visiting: Leading, name: str) -> ProgressReply:
    """The state of the queue. Leads only."""
    with visiting.database.read() as session:
        return ProgressReply(**asdict(progress(session, find_campaign(session, name), visiting.now)))


@router.get("/campaigns/{name}/agreement", tags=["reports"])
def get_agreement(visiting: Leading, name: str) -> AgreementReply:
    """How far people agree. Leads only."""
    with visiting.database.read() as session:
        return AgreementReply.of(campaign_agreement(session, find_campaign(session, name)))


@router.get("/campaigns/{name}/labelers", tags=["reports"])
def get_work(visiting: Leading, name: str) -> list[WorkReply]:
    """Each labeler's part. Leads only."""
    with visiting.database.read() as session:
        campaign = find_campaign(session, name)
        work = labeler_work(session, campaign, campaign_agreement(session, campaign))
    return [
        WorkReply(
            name=one.name,
            judgments=one.judgments,
            skips=one.skips,
            median_s=one.median_s,
            last_at=one.last_at,
            agreement=PairsReply.of(one.agreement),
        )
        for one in work
    ]


@router.get("/campaigns/{name}/win-rates", tags=["reports"])
def get_win_rates(visiting: Leading, name: str) -> list[WinRateReply]:
    """Which version people prefer, with 95 % intervals. Leads only."""
    with visiting.database.read() as session:
        return [WinRateReply(**asdict(rate)) for rate in win_rates(session, find_campaign(session, name))]


@router.post("/campaigns/{name}/next", tags=["tasks"])
def lease_next(visiting: Visiting, name: str) -> TaskReply | None:
    """The caller's next task, leased to them; null where nothing is left for them."""
    with visiting.database.write() as session:
        campaign = find_campaign(session, name)
        found = next_task(session, campaign, visiting.labeler, visiting.now)
    if found is None:
        return None
    with visiting.database.read() as session:
        lease = held_lease(session, found.task_id, visiting.labeler)
        if lease is None:
            raise LabelingError("the task was given back at this moment: ask again")
        texts = [response.text for response in lease.task.responses]
        return TaskReply(
            id=lease.task_id,
            campaign=name,
            kind=Kind(campaign.kind),
            prompt=lease.task.prompt,
            answers=[ShownAnswer(text=text) for text in shown(texts, lease.order)],
            lease_expires_at=lease.expires_at,
        )


@router.post("/tasks/{task_id}/judgment", tags=["tasks"])
def add_judgment(visiting: Visiting, task_id: int, body: JudgmentBody) -> ReceiptReply:
    """Save a judgment. When this answers, it is on the disk; the same key again answers the same."""
    with visiting.database.write() as session:
        receipt = submit(session, task_id, visiting.labeler, body.draft(), visiting.now)
    return ReceiptReply(**asdict(receipt))


@router.post("/tasks/{task_id}/skip", tags=["tasks"], status_code=204)
def add_skip(visiting: Visiting, task_id: int, body: SkipBody) -> None:
    """Pass a task over."""
    with visiting.database.write() as session:
        skip_task(session, task_id, visiting.labeler, body.reason, visiting.now)


@router.post("/tasks/{task_id}/lease", tags=["tasks"])
def renew_lease(visiting: Visiting, task_id: int) -> dict[str, Any]:
    """Keep a task longer; 409 where others have taken it meanwhile."""
    with visiting.database.write() as session:
        return {"lease_expires_at": renew(session, task_id, visiting.labeler, visiting.now)}


@router.get("/labelers", tags=["labelers"])
def list_labelers(visiting: Leading) -> list[LabelerReply]:
    """All people. Leads only."""
    with visiting.database.read() as session:
        return [_labeler(labeler) for labeler in session.scalars(select(Labeler).order_by(Labeler.name))]


@router.post("/labelers", tags=["labelers"], status_code=201)
def new_labeler(visiting: Administering, body: LabelerBody) -> TokenReply:
    """Add a person; their token is in the reply and nowhere else. Admins only."""
    with visiting.database.write() as session:
        labeler, token = add_labeler(session, body.name, body.role, visiting.now)
        return TokenReply(name=labeler.name, token=token)


@router.post("/labelers/{name}/token", tags=["labelers"])
def new_token(visiting: Administering, name: str) -> TokenReply:
    """A new token in place of the old one. Admins only."""
    with visiting.database.write() as session:
        return TokenReply(name=name, token=renew_token(session, name))


@router.put("/labelers/{name}/role", tags=["labelers"], status_code=204)
def put_role(visiting: Administering, name: str, role: Annotated[Role, Body(embed=True)]) -> None:
    """Give a person another role. Admins only."""
    with visiting.database.write() as session:
        set_role(session, name, role)


@router.post("/labelers/{name}/disable", tags=["labelers"], status_code=204)
def disable(visiting: Administering, name: str) -> None:
    """Let a person in no more; what they said stays. Admins only."""
    with visiting.database.write() as session:
        disable_labeler(session, name, visiting.now)


@router.get("/labelers/{name}/data", tags=["labelers"])
def get_data(visiting: Administering, name: str) -> dict[str, Any]:
    """Everything kept about a person. Admins only."""
    with visiting.database.read() as session:
        return labeler_data(session, name)


@router.delete("/labelers/{name}", tags=["labelers"])
def remove_labeler(visiting: Administering, name: str) -> dict[str, int]:
    """Delete a person and all they did; how many judgments went. Admins only."""
    with visiting.database.write() as session:
        return {"judgments": delete_labeler(session, name)}


def _campaign(campaign: Campaign, visiting: Visit) -> CampaignReply:
    reply = CampaignReply.of(campaign)
    is_lead = Role(visiting.labeler.role).includes(Role.LEAD)
    return reply if is_lead else reply.model_copy(update={"sources": []})


def _labeler(labeler: Labeler) -> LabelerReply:
    return LabelerReply(
        name=labeler.name,
        role=Role(labeler.role),
        can_sign_in=labeler.token_hash is not None and labeler.disabled_at is None,
        created_at=labeler.created_at,
    )
