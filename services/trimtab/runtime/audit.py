"""The audit log: who did what when, for acts that change what is served, trained or allowed.

Each act is one structured line in the log (`event: audit`) and, with `auth.audit_file`, one JSON line of that file,
on disk before the act is answered. Refused acts of known callers are there too. Requests' content never is, nor tokens.
"""

import getpass
import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimtab.runtime.errors import StartError
from trimtab.runtime.logs import get_logger

log = get_logger("trimtab.audit")


class AuditLog:
    """Writes acts to the log and to `path`. StartError where the file cannot be written."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._open().close()
            except OSError as error:
                raise StartError(f"auth.audit_file: cannot write {path}: {error.strerror}") from None

    def act(self, *, who: str, what: str, target: str = "", outcome: str = "OK", peer: str = "") -> None:
        """Note one act. `outcome` is a gRPC code's name; `target` the run, version or key that it was done to."""
        entry = {"who": who, "what": what, "target": target, "outcome": outcome, "peer": peer}
        log.info("audit", **entry)
        if self._path is not None:
            line = json.dumps({"when": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry})
            try:
                with self._lock, self._open() as file:
                    file.write(line + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # the act is done, and in the log above
                log.error("cannot write the audit file", path=str(self._path), reason=error.strerror)

    def _open(self) -> Any:
        assert self._path is not None
        return os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8")


def target_of(request: Any) -> str:
    """What a request of an audited method is about: its version or its run, nothing else of it."""
    fields = request.DESCRIPTOR.fields_by_name
    if "version" in fields:
        version = request.version
        return f"{version.run_id}/{version.name}@{version.step}"[:300]
    return str(request.run_id)[:300] if "run_id" in fields else ""


def operator() -> str:
    """Who runs a command on this machine."""
    try:
        return f"operator:{getpass.getuser()}"
    except (KeyError, OSError):
        return f"operator:uid-{os.getuid()}"
