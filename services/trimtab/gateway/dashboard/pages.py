"""The pages (charts, samples, people, versions), the sign-in page, and the files that they load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from trimtab.gateway.access import Gate
from trimtab.gateway.guard import CERTIFICATE_NAMES
from trimtab.gateway.problems import Problem
from trimtab.gateway.room import room_of
from trimtab.runtime.roles import ROLES

router = APIRouter(include_in_schema=False)
HERE = Path(__file__).parent
STATIC = {path.name: path for path in (HERE / "static").iterdir()}
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".LICENSE": "text/plain"}
TEMPLATES = Environment(
    loader=FileSystemLoader(HERE / "templates"), autoescape=select_autoescape(), undefined=StrictUndefined
)


def gate_of(request: Request) -> Gate:
    """The gate of the application that a request came to."""
    return request.app.state.gate


async def roles_of(request: Request) -> frozenset[str]:
    """The roles of who asks."""
    gate = gate_of(request)
    if gate.is_open:
        return ROLES
    names = request.scope.get("state", {}).get(CERTIFICATE_NAMES, ())
    return (await gate.principal(request.headers, names)).roles


async def page(request: Request, name: str, **values: Any) -> Response:
    """A rendered page."""
    room = room_of(request)
    values |= {"page": name, "open": gate_of(request).is_open, "trainer": room.config.trainer or ""}
    return HTMLResponse(TEMPLATES.get_template(f"{name}.html").render(values))


@router.get("/dashboard")
async def charts(request: Request) -> Response:
    """The live charts of a run."""
    return await page(request, "charts")


@router.get("/dashboard/sign-in")
async def sign_in(request: Request) -> Response:
    """The form for a token."""
    return await page(request, "sign_in")


@router.get("/dashboard/static/{name}")
async def static(name: str) -> Response:
    """A script, a style or a picture."""
    path = STATIC.get(name)
    if path is None:
        raise Problem("NOT_FOUND", "no such file")
    return FileResponse(path, media_type=TYPES[path.suffix])
