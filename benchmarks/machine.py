"""What a figure was measured on, and whether the machine was quiet: cores, commit, busy cores, memory. Linux only."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Machine:
    """Where and with which code a run was made."""

    cpu: str
    cores: int
    memory_gb: float
    python: str
    commit: str
    uncommitted_changes: bool


def describe_machine() -> Machine:
    """This machine and this checkout."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        cpu=cpu[1] if cpu else platform.processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(pages / 2**30, 1),
        python=platform.python_version(),
        commit=git("rev-parse", "HEAD"),
        uncommitted_changes=bool(git("status", "--porcelain", "--untracked-files=no")),
    )


def git(*arguments: str) -> str:
    """Output of a git command in this checkout; empty where it is not one."""
    folder = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


class BusyMeter:
    """Mean number of cores that the whole machine kept busy since the meter was made."""

    def __init__(self) -> None:
        self._since_s, self._busy_s = time.perf_counter(), busy_seconds()

    def cores(self) -> float:
        return (busy_seconds() - self._busy_s) / (time.perf_counter() - self._since_s)


def busy_seconds() -> float:
    """CPU seconds of all processes since boot, with what the hypervisor took away."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, _cpu_fields()[:8])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def _cpu_fields() -> list[str]:
    return Path("/proc/stat").read_text().splitlines()[0].split()[1:]


def wait_until_quiet(limit_cores: float, *, timeout_s: float, sample_s: float = 3.0) -> float:
    """Wait until others keep fewer than `limit_cores` busy, at most `timeout_s`; returns what the last sample saw."""
    deadline = time.monotonic() + timeout_s
    while True:
        meter = BusyMeter()
        time.sleep(sample_s)
        if (cores := meter.cores()) < limit_cores or time.monotonic() >= deadline:
            return cores


def cpu_seconds(pid: int) -> float:
    """CPU time that a live process has used so far, all its threads."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / TICKS_PER_S


def session_cpu_seconds(session: int) -> float:
    """CPU time that the live processes of a session have used so far, and their children that ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(after_name[3]) == session:
            ticks += sum(map(int, after_name[11:15]))
    return ticks / TICKS_PER_S


def peak_memory_mb(pids: Iterable[int]) -> float:
    """Peak resident memory of live processes, as if all peaks fell together; file pages (libraries) count once."""
    states = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    files = [_kilobytes("RssFile", state) for state in states]
    own = sum(_kilobytes("VmHWM", state) - file for state, file in zip(states, files, strict=True))
    return (own + max(files, default=0)) / 1024


def _kilobytes(field: str, state: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", state)
    return int(found[1]) if found else 0
