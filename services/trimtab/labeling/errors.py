"""What labeling refuses, as exceptions that say what to do. The web side turns each into its HTTP status."""

from __future__ import annotations


class LabelingError(Exception):
    """Something was refused; the message is one line for the person who asked. `status` is its HTTP status."""

    status = 400


class InvalidError(LabelingError):
    """A field is wrong. `field` names it ("ranks[3]"), "" for the whole."""

    status = 422

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason


class NotFoundError(LabelingError):
    """There is no such campaign, task or labeler, or not for this person."""

    status = 404


class ForbiddenError(LabelingError):
    """This person may not do that."""

    status = 403


class UnauthenticatedError(LabelingError):
    """Nobody is signed in, or the session has expired."""

    status = 401


class ConflictError(LabelingError):
    """It contradicts what is already there."""

    status = 409


class DatabaseError(LabelingError):
    """The database cannot be used."""

    status = 503
