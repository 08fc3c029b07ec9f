"""One answer of the doctor: what was looked at, how it stands, and what to do where it stands badly."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How a thing stands. Only `FAILED` makes a recipe unfit; `SKIPPED` could not be looked at here."""

    OK = "ok"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is there where `state` is failed."""

    check: str
    state: State
    detail: str
    fix: str = ""


def ok(check: str, detail: str) -> Finding:
    """It is as it should be."""
    return Finding(check, State.OK, detail)


def skipped(check: str, why: str) -> Finding:
    """It could not be looked at from here."""
    return Finding(check, State.SKIPPED, why)


def failed(check: str, detail: str, fix: str) -> Finding:
    """It would stop the run, or spoil it."""
    return Finding(check, State.FAILED, detail, fix)
