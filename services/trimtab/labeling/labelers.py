"""People: added by an operator, known by a name and an access token, taken out with all they did.

Tokens are drawn here, never chosen by people: 256 random bits, of which only the SHA-256 is kept. A slow password hash
would protect guessable secrets; these cannot be guessed, and a hash that can be looked up keeps the API fast.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from trimtab.labeling.errors import ConflictError, InvalidError, NotFoundError
from trimtab.labeling.tables import Judgment, Labeler, Lease, Skip, Submission, Task, WebSession
from trimtab.labeling.vocabulary import Role

NAME = re.compile(r"[^\s/\\?#%&<>\"]{1,100}")


def add_labeler(session: Session, name: str, role: Role, now: datetime) -> tuple[Labeler, str]:
    """A new person and their token, which is not kept and so is shown only now. ConflictError where the name is taken.

    A name that so far only imported rankings carry becomes a person who can sign in.
    """
    if not NAME.fullmatch(name):
        raise InvalidError("name", '1 to 100 letters, digits and signs, without blanks and / \\ ? # % & < > "')
    labeler = session.scalar(select(Labeler).where(Labeler.name == name))
    if labeler is not None and (labeler.token_hash is not None or labeler.disabled_at is not None):
        raise ConflictError(f"there is already a labeler named {name}")
    if labeler is None:
        labeler = Labeler(name=name, created_at=now)
        session.add(labeler)
    token = new_secret()
    labeler.role, labeler.token_hash = role, hash_secret(token)
    session.flush()
    return labeler, token


def imported_labeler(session: Session, name: str, now: datetime) -> Labeler:
    """The person of that name, made without a token where there is none."""
    labeler = session.scalar(select(Labeler).where(Labeler.name == name))
    if labeler is None:
        labeler = Labeler(name=name[:100], role=Role.LABELER, created_at=now)
        session.add(labeler)
        session.flush()
    return labeler


def find_labeler(session: Session, name: str) -> Labeler:
    """The person of that name; NotFoundError."""
    labeler = session.scalar(select(Labeler).where(Labeler.name == name))
    if labeler is None:
        raise NotFoundError(f"there is no labeler named {name}")
    return labeler


def by_token(session: Session, token: str, name: str | None = None) -> Labeler | None:
    """Who has this token (and this name, where one is given); None where nobody has or they were disabled."""
    found = session.scalar(select(Labeler).where(Labeler.token_hash == hash_secret(token)))
    if found is None or found.disabled_at is not None or (name is not None and found.name != name):
        return None
    return found


def renew_token(session: Session, name: str) -> str:
    """A new token in place of the old one, which ends at once, as do the person's sessions."""
    labeler = find_labeler(session, name)
    token = new_secret()
    labeler.token_hash, labeler.disabled_at = hash_secret(token), None
    _end_sessions(session, labeler)
    return token


def set_role(session: Session, name: str, role: Role) -> None:
    """Give a person another role."""
    find_labeler(session, name).role = role


def disable_labeler(session: Session, name: str, now: datetime) -> None:
    """Keep what a person did, but let them in no more. Tasks in their hands go back to the queue."""
    labeler = find_labeler(session, name)
    labeler.disabled_at = now
    _end_sessions(session, labeler)
    session.execute(delete(Lease).where(Lease.labeler_id == labeler.id))


def delete_labeler(session: Session, name: str) -> int:
    """Remove a person and all they did; returns how many judgments went. Their tasks are open to others again."""
    labeler = find_labeler(session, name)
    counted = select(Judgment.task_id).where(Judgment.labeler_id == labeler.id, ~Judgment.is_adjudication)
    session.execute(update(Task).where(Task.id.in_(counted)).values(judgment_count=Task.judgment_count - 1))
    count = session.scalar(select(func.count()).select_from(Judgment).where(Judgment.labeler_id == labeler.id)) or 0
    session.delete(labeler)
    session.flush()
    return count


def labeler_data(session: Session, name: str) -> dict[str, Any]:
    """Everything kept about one person, as JSON values: who they are, every save, every skip."""
    labeler = find_labeler(session, name)
    saves = session.execute(
        select(Submission, Judgment)
        .join(Judgment, Submission.judgment_id == Judgment.id)
        .where(Judgment.labeler_id == labeler.id)
        .order_by(Submission.received_at)
    )
    skips = session.scalars(select(Skip).where(Skip.labeler_id == labeler.id).order_by(Skip.skipped_at))
    leases = session.scalars(select(Lease).where(Lease.labeler_id == labeler.id).order_by(Lease.granted_at))
    return {
        "name": labeler.name,
        "role": labeler.role,
        "created_at": labeler.created_at.isoformat(),
        "disabled_at": labeler.disabled_at.isoformat() if labeler.disabled_at else None,
        "submissions": [
            {
                "task_id": judgment.task_id,
                "revision": saved.revision,
                "received_at": saved.received_at.isoformat(),
                "order_shown": judgment.order,
                "content": saved.content,
            }
            for saved, judgment in saves
        ],
        "skips": [{"task_id": s.task_id, "reason": s.reason, "at": s.skipped_at.isoformat()} for s in skips],
        "leases": [{"task_id": lease.task_id, "granted_at": lease.granted_at.isoformat()} for lease in leases],
    }


def new_secret() -> str:
    """256 random bits as text that fits a URL."""
    return secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _end_sessions(session: Session, labeler: Labeler) -> None:
    session.execute(delete(WebSession).where(WebSession.labeler_id == labeler.id))
