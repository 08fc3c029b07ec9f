"""The progress of long jobs: rows, rows a second and, where the end is known, a bar and what is left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

EVERY_S = 0.5
EVERY_WITHOUT_TERMINAL_S = 30.0
BAR_WIDTH = 24


class Progress:
    """One line on stderr: redrawn on a terminal, printed now and then elsewhere; nothing where it is not `shown`."""

    def __init__(self, shown: bool, total: int | None = None, stream: TextIO | None = None) -> None:
        self._stream = (stream or sys.stderr) if shown else None
        self._total = total
        self._rows = 0
        self._started_s = time.monotonic()
        terminal = self._stream is not None and self._stream.isatty()
        self._every_s = EVERY_S if terminal else EVERY_WITHOUT_TERMINAL_S
        self._line = "\r\x1b[2K{}" if terminal else "{}\n"
        self._last_s = self._started_s

    def add(self, rows: int) -> None:
        """So many more are done."""
        self._rows += rows
        now = time.monotonic()
        if self._stream is not None and now - self._last_s >= self._every_s:
            self._last_s = now
            self._say()

    def done(self) -> None:
        """All are done."""
        if self._stream is not None:
            self._say()
            if self._line.startswith("\r"):
                self._stream.write("\n")
                self._stream.flush()

    def _say(self) -> None:
        assert self._stream is not None
        rate = self._rows / max(1e-9, time.monotonic() - self._started_s)
        text = f"{self._rows:,} rows, {rate:,.0f} rows/s"
        if self._total:
            part = min(1.0, self._rows / self._total)
            left_s = max(0, self._total - self._rows) / rate if rate else 0.0
            text = (
                f"[{'#' * int(BAR_WIDTH * part):.<{BAR_WIDTH}}] {100 * part:3.0f} %  {text}, {_duration(left_s)} left"
            )
        self._stream.write(self._line.format(text))
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
