"""What a request needs: the database, the clock, who is asking, in which language. FastAPI hands it to the handlers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import Depends, Request
from starlette.datastructures import FormData, UploadFile

from trimtab.labeling.config import LabelingConfig
from trimtab.labeling.database import Database
from trimtab.labeling.errors import ForbiddenError, LabelingError, UnauthenticatedError
from trimtab.labeling.labelers import by_token
from trimtab.labeling.sessions import SignedIn, find_session, touch, wants_touch
from trimtab.labeling.tables import Labeler
from trimtab.labeling.translations import choose_language
from trimtab.labeling.vocabulary import Role

SESSION_COOKIE = "trimtab_session"
LANGUAGE_COOKIE = "trimtab_language"
THEME_COOKIE = "trimtab_theme"
CSRF_HEADER = "x-csrf-token"
MOST_FORM_FIELDS = 2000


@dataclass(frozen=True)
class Room:
    """What all requests share."""

    database: Database
    config: LabelingConfig
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    @property
    def idle(self) -> timedelta:
        return timedelta(hours=self.config.session_hours)


@dataclass(frozen=True)
class Visit:
    """One request of a person who is signed in."""

    room: Room
    signed_in: SignedIn
    language: str
    now: datetime

    @property
    def database(self) -> Database:
        return self.room.database

    @property
    def labeler(self) -> Labeler:
        return self.signed_in.labeler

    def require(self, role: Role) -> None:
        """ForbiddenError where the person has a lesser role."""
        if not Role(self.labeler.role).includes(role):
            raise ForbiddenError(f"this needs the role {role}; yours is {self.labeler.role}")


def room_of(request: Request) -> Room:
    """The room that the app was made with."""
    return request.app.state.room


def language_of(request: Request) -> str:
    """The visitor's choice, else the browser's."""
    return choose_language(request.cookies.get(LANGUAGE_COOKIE), request.headers.get("accept-language", ""))


def visit(request: Request) -> Visit:
    """Who asks, by cookie or bearer token. UnauthenticatedError for nobody; ForbiddenError without the form's token.

    A request that changes something and comes with a cookie must prove that our own page sent it: by the header
    X-CSRF-Token here, or by a form's hidden field (`posted_form`).
    """
    room = room_of(request)
    now = room.clock()
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        with room.database.read() as session:
            labeler = by_token(session, token.strip())
        if labeler is None:
            raise UnauthenticatedError("this access token is not known, or was withdrawn")
        return Visit(room, SignedIn(labeler, ""), language_of(request), now)
    signed_in = _by_cookie(request, room, now)
    checked_later = request.method in ("GET", "HEAD", "OPTIONS") or _is_page_form(request)
    if not checked_later and not signed_in.accepts_form(request.headers.get(CSRF_HEADER, "")):
        raise ForbiddenError("the page is out of date: load it again")
    return Visit(room, signed_in, language_of(request), now)


def _by_cookie(request: Request, room: Room, now: datetime) -> SignedIn:
    secret = request.cookies.get(SESSION_COOKIE, "")
    with room.database.read() as session:
        found = find_session(session, secret, now) if secret else None
    if found is None:
        raise UnauthenticatedError("sign in first")
    if wants_touch(found, now, room.idle):
        with room.database.write() as session:
            touch(session, found.id, now, room.idle)
    return SignedIn(found.labeler, found.csrf_token)


def _is_page_form(request: Request) -> bool:
    """A form that a page posts: all handlers of such take `Posted`, which checks its field. The API takes none."""
    if request.url.path.startswith("/api/"):
        return False
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind in ("application/x-www-form-urlencoded", "multipart/form-data")


@dataclass(frozen=True)
class Form:
    """The fields of a posted form; a missing one is "" and an unticked box is not there."""

    data: FormData

    def text(self, name: str) -> str:
        value = self.data.get(name, "")
        return value if isinstance(value, str) else ""

    def texts(self, name: str) -> list[str]:
        return [value for value in self.data.getlist(name) if isinstance(value, str)]

    def integer(self, name: str) -> int | None:
        """A whole number, None for an empty field; LabelingError for anything else."""
        value = self.text(name).strip()
        try:
            return int(value) if value else None
        except ValueError:
            raise LabelingError(f"{name}: a whole number, found {value[:40]!r}") from None

    def upload(self, name: str) -> str:
        """The text of an uploaded file, "" without one; LabelingError where it is not UTF-8."""
        value = self.data.get(name)
        if not isinstance(value, UploadFile):
            return ""
        try:
            return value.file.read().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise LabelingError("the file is not UTF-8 text") from None


async def posted_form(request: Request, visit: Annotated[Visit, Depends(visit)]) -> Form:
    """A form of one of our own pages; ForbiddenError without the session's token."""
    form = Form(await request.form(max_fields=MOST_FORM_FIELDS, max_part_size=visit.room.config.max_upload_bytes))
    if not visit.signed_in.accepts_form(form.text("csrf")):
        raise ForbiddenError("the page is out of date: load it again")
    return form


Visiting = Annotated[Visit, Depends(visit)]
Posted = Annotated[Form, Depends(posted_form)]
