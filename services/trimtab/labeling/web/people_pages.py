"""The admin's page: who may sign in, new tokens, roles, and one person's data to take out or to delete."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from sqlalchemy import func, select

from trimtab.labeling.errors import LabelingError
from trimtab.labeling.labelers import add_labeler, delete_labeler, disable_labeler, labeler_data, renew_token, set_role
from trimtab.labeling.tables import Judgment, Labeler
from trimtab.labeling.vocabulary import Role
from trimtab.labeling.web.pages import page
from trimtab.labeling.web.room import Posted, Visit, Visiting

router = APIRouter(prefix="/people", include_in_schema=False)


def _admin(visiting: Visiting) -> Visit:
    visiting.require(Role.ADMIN)
    return visiting


Administering = Annotated[Visit, Depends(_admin)]


@router.get("")
def people(request: Request, visiting: Administering) -> HTMLResponse:
    """Everybody, with what they have done."""
    return _people_page(request, visiting)


@router.post("")
def add(request: Request, visiting: Administering, form: Posted) -> HTMLResponse:
    """Add a person and show their token, this once."""
    try:
        with visiting.database.write() as session:
            labeler, token = add_labeler(session, form.text("name").strip(), Role(form.text("role")), visiting.now)
    except LabelingError as error:
        return _people_page(request, visiting, wrong=str(error))
    return _people_page(request, visiting, token=token, token_of=labeler.name)


@router.post("/{name}/token")
def token(request: Request, visiting: Administering, form: Posted, name: str) -> HTMLResponse:
    """A new token in place of the old one."""
    with visiting.database.write() as session:
        fresh = renew_token(session, name)
    return _people_page(request, visiting, token=fresh, token_of=name)


@router.post("/{name}/role")
def role(visiting: Administering, form: Posted, name: str) -> Response:
    """Another role."""
    _not_oneself(visiting, name)
    with visiting.database.write() as session:
        set_role(session, name, Role(form.text("role")))
    return RedirectResponse("/people", 303)


@router.post("/{name}/disable")
def disable(visiting: Administering, form: Posted, name: str) -> Response:
    """Let a person in no more."""
    _not_oneself(visiting, name)
    with visiting.database.write() as session:
        disable_labeler(session, name, visiting.now)
    return RedirectResponse("/people", 303)


@router.post("/{name}/delete")
def delete(request: Request, visiting: Administering, form: Posted, name: str) -> Response:
    """Delete a person and all they did, once their name was typed."""
    _not_oneself(visiting, name)
    if form.text("confirm") != name:
        return _people_page(request, visiting, wrong=f"type the name {name} to delete all that {name} did")
    with visiting.database.write() as session:
        delete_labeler(session, name)
    return RedirectResponse("/people", 303)


@router.get("/{name}/data.json")
def data(visiting: Administering, name: str) -> Response:
    """Everything kept about a person, as a file."""
    with visiting.database.read() as session:
        content = json.dumps(labeler_data(session, name), ensure_ascii=False, indent=1)
    return Response(
        content, media_type="application/json", headers={"Content-Disposition": 'attachment; filename="labeler.json"'}
    )


def _not_oneself(visiting: Visit, name: str) -> None:
    if visiting.labeler.name == name:
        raise LabelingError("not oneself: another admin must do that")


def _people_page(
    request: Request, visiting: Visit, *, token: str = "", token_of: str = "", wrong: str = ""
) -> HTMLResponse:
    with visiting.database.read() as session:
        rows = session.execute(
            select(Labeler, func.count(Judgment.id))
            .outerjoin(Judgment, Judgment.labeler_id == Labeler.id)
            .group_by(Labeler.id)
            .order_by(Labeler.name)
        ).tuples()
        everybody = [(labeler, count) for labeler, count in rows]
    values = {"people": everybody, "roles": list(Role), "token": token, "token_of": token_of, "wrong": wrong}
    return page(request, "people.html", visiting, status=422 if wrong else 200, **values)
