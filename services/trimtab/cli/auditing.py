"""Where commands note the acts that servers would note: who may call, what is current, who labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trimtab.runtime.audit import AuditLog

AuditFile = Annotated[
    Path | None,
    typer.Option(
        envvar="TRIMTAB_AUTH__AUDIT_FILE",
        help="Where the change is noted; default: beside what is changed, or on stderr where that is no file.",
    ),
]


def open_audit(given: Path | None, beside: Path | None) -> AuditLog:
    """Notes acts in the file that was given, else in one beside what is changed, else (None) in the log on stderr.

    StartError where it cannot be written: a command asks before it changes anything.
    """
    from trimtab.runtime.audit import AuditLog
    from trimtab.runtime.logs import configure_logs

    path = given or beside
    configure_logs("info" if path is None else "warning")  # with a file, the command says itself what it did
    return AuditLog(path)
