"""Signed-in browsers. A session ends by itself when it is not used, at the latest after a week, or on signing out."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session, joinedload

from trimtab.labeling.labelers import hash_secret, new_secret
from trimtab.labeling.tables import Labeler, WebSession

LONGEST = timedelta(days=7)
TOUCH_EVERY = timedelta(minutes=5)  # a session in use is written at most so often


@dataclass(frozen=True)
class SignedIn:
    """Who a request comes from. `csrf_token` must come back with each form; "" for callers with a bearer token."""

    labeler: Labeler
    csrf_token: str

    def accepts_form(self, token: str) -> bool:
        """Whether a form carries the session's token."""
        return bool(self.csrf_token) and hmac.compare_digest(token.encode(), self.csrf_token.encode())


def start_session(session: Session, labeler: Labeler, now: datetime, idle: timedelta) -> str:
    """A new session's secret, for the cookie. Sessions that have ended are removed on the way."""
    session.execute(delete(WebSession).where(WebSession.expires_at <= now))
    secret = new_secret()
    session.add(
        WebSession(
            secret_hash=hash_secret(secret),
            csrf_token=new_secret(),
            labeler_id=labeler.id,
            created_at=now,
            expires_at=min(now + idle, now + LONGEST),
        )
    )
    session.flush()
    return secret


def find_session(session: Session, secret: str, now: datetime) -> WebSession | None:
    """The running session of that cookie; None where it has ended or its person was disabled."""
    found = session.scalar(
        select(WebSession).where(WebSession.secret_hash == hash_secret(secret)).options(joinedload(WebSession.labeler))
    )
    if found is None or found.expires_at <= now or found.labeler.disabled_at is not None:
        return None
    return found


def wants_touch(found: WebSession, now: datetime, idle: timedelta) -> bool:
    """Whether the session's end should be moved on because it is used."""
    return _end(found, now, idle) - found.expires_at > min(TOUCH_EVERY, idle / 2)


def touch(session: Session, session_id: int, now: datetime, idle: timedelta) -> None:
    """Move a session's end on."""
    found = session.get(WebSession, session_id)
    if found is not None:
        found.expires_at = _end(found, now, idle)


def end_session(session: Session, secret: str) -> None:
    """Sign out."""
    session.execute(delete(WebSession).where(WebSession.secret_hash == hash_secret(secret)))


def _end(found: WebSession, now: datetime, idle: timedelta) -> datetime:
    return min(now + idle, found.created_at + LONGEST)
