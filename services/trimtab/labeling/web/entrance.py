"""The ways in and out: signing in and out, and the choice of language and theme."""

from __future__ import annotations

import hmac
import time
from collections import defaultdict, deque
from threading import Lock
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from trimtab.labeling.errors import ForbiddenError, UnauthenticatedError
from trimtab.labeling.labelers import by_token, new_secret
from trimtab.labeling.sessions import end_session, start_session
from trimtab.labeling.translations import LANGUAGES
from trimtab.labeling.web.pages import THEMES, page
from trimtab.labeling.web.room import (
    LANGUAGE_COOKIE,
    SESSION_COOKIE,
    THEME_COOKIE,
    Form,
    Posted,
    Visiting,
    room_of,
    visit,
)

router = APIRouter(include_in_schema=False)
SIGN_IN_COOKIE = "trimtab_signing_in"
YEAR_S = 365 * 24 * 3600
MOST_FAILURES, FAILURE_WINDOW_S = 20, 60.0


class Failures:
    """Failed sign-ins by address: a few a minute are people, more are a program."""

    def __init__(self) -> None:
        self._times: dict[str, deque[float]] = defaultdict(deque)
        self._lock = Lock()

    def too_many(self, address: str) -> bool:
        with self._lock:
            times = self._times[address]
            while times and times[0] < time.monotonic() - FAILURE_WINDOW_S:
                times.popleft()
            return len(times) >= MOST_FAILURES

    def add(self, address: str) -> None:
        with self._lock:
            self._times[address].append(time.monotonic())


_failures = Failures()


@router.get("/sign-in")
def sign_in_page(request: Request, next: str = "/", failed: str = "") -> Response:
    """The form; who is signed in already goes on."""
    try:
        visit(request)
    except UnauthenticatedError:
        secret = request.cookies.get(SIGN_IN_COOKIE) or new_secret()
        shown = page(request, "sign_in.html", next=_own_path(next), failed=bool(failed), csrf_signin=secret)
        _set_cookie(request, shown, SIGN_IN_COOKIE, secret, http_only=True, max_age=3600)
        return shown
    return RedirectResponse(_own_path(next), 303)


async def _sign_in_form(request: Request) -> Form:
    return Form(await request.form(max_fields=20))


@router.post("/sign-in")
def sign_in(request: Request, form: Annotated[Form, Depends(_sign_in_form)]) -> Response:
    """Start a session for the right name and token. The form must come from our own page (double-submit cookie)."""
    cookie = request.cookies.get(SIGN_IN_COOKIE, "")
    if not cookie or not hmac.compare_digest(cookie.encode(), form.text("csrf").encode()):
        raise ForbiddenError("the page is out of date: load it again")
    address = request.client.host if request.client else ""
    if _failures.too_many(address):
        raise ForbiddenError("too many failed sign-ins: wait a minute")
    room, target = room_of(request), _own_path(form.text("next"))
    now = room.clock()
    with room.database.write() as session:
        labeler = by_token(session, form.text("token").strip(), form.text("name").strip())
        secret = start_session(session, labeler, now, room.idle) if labeler is not None else None
    if secret is None:
        _failures.add(address)
        return RedirectResponse(f"/sign-in?failed=1&next={target}", 303)
    response = RedirectResponse(target, 303)
    _set_cookie(request, response, SESSION_COOKIE, secret, http_only=True, max_age=None)
    response.delete_cookie(SIGN_IN_COOKIE)
    return response


@router.post("/sign-out")
def sign_out(request: Request, visiting: Visiting, form: Posted) -> Response:
    """End the session."""
    with visiting.database.write() as session:
        end_session(session, request.cookies.get(SESSION_COOKIE, ""))
    response = RedirectResponse("/sign-in", 303)
    response.delete_cookie(SESSION_COOKIE)
    return response


@router.get("/choose")
def choose(request: Request, language: str = "", theme: str = "", back: str = "/") -> Response:
    """Keep a language or theme in a cookie. It changes nothing else, so a plain link may do it."""
    response = RedirectResponse(_own_path(back), 303)
    if language in LANGUAGES:
        _set_cookie(request, response, LANGUAGE_COOKIE, language, http_only=True, max_age=YEAR_S)
    if theme in THEMES:
        _set_cookie(request, response, THEME_COOKIE, theme, http_only=True, max_age=YEAR_S)
    return response


@router.get("/about-keys")
def about_keys(request: Request, visiting: Visiting) -> HTMLResponse:
    """All keys of the ranking page, for those without its dialog."""
    return page(request, "keys.html", visiting)


def _own_path(target: str) -> str:
    """A path on this server; anything that leads elsewhere becomes the home page."""
    parts = urlsplit(target)
    own = target.startswith("/") and not target.startswith(("//", "/\\")) and not parts.netloc and not parts.scheme
    return target if own and "\n" not in target and "\r" not in target else "/"


def _set_cookie(
    request: Request, response: Response, name: str, value: str, *, http_only: bool, max_age: int | None
) -> None:
    secure = request.url.scheme == "https"
    response.set_cookie(name, value, max_age=max_age, httponly=http_only, samesite="lax", secure=secure)
