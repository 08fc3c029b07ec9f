"""Signing in and out: a token for a cookie."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.datastructures import Headers

from trimtab.gateway.dashboard.door import COOKIE, PREFIX
from trimtab.gateway.dashboard.pages import gate_of
from trimtab.gateway.room import room_of

router = APIRouter(include_in_schema=False)
SESSION_S = 12 * 3600


class SignIn(BaseModel):
    """What the form sends."""

    token: str = Field(
        min_length=1, max_length=16_384, pattern=r"^[!-:<-~]+$", description="ASCII, no space or semicolon."
    )


@router.post("/dashboard/session")
async def sign_in(request: Request, form: Annotated[SignIn, Body()]) -> Response:
    """Check a token and keep it in the browser; Problem 401 where it is not known."""
    principal = await gate_of(request).principal(Headers({"authorization": f"Bearer {form.token}"}))
    answer = JSONResponse({"name": principal.name})
    answer.set_cookie(COOKIE, form.token, max_age=SESSION_S, **_attributes(request))
    return answer


@router.delete("/dashboard/session")
async def sign_out(request: Request) -> Response:
    """Forget the token."""
    answer = JSONResponse({})
    answer.delete_cookie(COOKIE, **_attributes(request))
    return answer


def _attributes(request: Request) -> dict[str, Any]:
    secure = room_of(request).config.has_tls
    return {"path": PREFIX, "secure": secure, "httponly": True, "samesite": "strict"}
