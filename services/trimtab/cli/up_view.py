"""What `trimtab up` shows: a live table on a terminal, one line per change of state without one."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trimtab.rounds.launchers.local import Supervisor
from trimtab.rounds.launchers.process import ProcessState, ProcessStatus

STYLES = {ProcessState.SERVING: "green", ProcessState.FAILED: "bold red", ProcessState.STOPPED: "dim"}


class UpView:
    """Shows a supervisor's processes; `event` may be called from its thread."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> UpView:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def event(self, status: ProcessStatus) -> None:
        """Say a change of state; on a terminal only what a person must not miss, above the table."""
        if self._live and status.state not in {ProcessState.WAITING, ProcessState.FAILED}:
            return
        line = Text(f"{status.name}: {status.state} {status.message}".rstrip())
        self._console.print(line, soft_wrap=True, style=STYLES.get(status.state, "yellow") if self._live else "")

    def refresh(self, supervisor: Supervisor) -> None:
        """Draw the table anew."""
        if self._live:
            self._live.update(status_table(supervisor.statuses()), refresh=True)


def status_table(statuses: tuple[ProcessStatus, ...]) -> Table:
    """One row a process: service, state and since when, address, pid, restarts, log."""
    table = Table("service", "state", "for", "address", "pid", "restarts", "log", box=None, pad_edge=False)
    for status in statuses:
        state = Text(status.state, style=STYLES.get(status.state, "yellow"))
        seconds = int(time.monotonic() - status.since)
        age = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        pid = str(status.pid or "")
        table.add_row(status.name, state, age, status.address, pid, str(status.restarts), str(status.log_path))
    return table
