"""A supervisor of local service processes: start, watch, restart, and leave nothing behind.

    with Supervisor(on_event=print_event) as supervisor:
        supervisor.add(generator, reward)
        supervisor.wait_ready()
        ...

Leaving the block stops every process (SIGTERM, grace, SIGKILL); if the supervisor itself is killed, the
kernel kills its children (tether.py). It knows nothing of what the processes do: services.py describes
trimtab's services for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from trimtab.rounds.launchers.process import (
    ENDED,
    LaunchError,
    ProcessSpec,
    ProcessState,
    ProcessStatus,
    RestartPolicy,
    SupervisedProcess,
)

TICK_S = 0.05


class Supervisor:
    """Runs processes on behalf of one program. Methods may be called from any thread.

    `on_event` gets a ProcessStatus at every change of state, on the supervisor's own thread: it should
    only print or put the status somewhere.
    """

    def __init__(
        self,
        *,
        on_event: Callable[[ProcessStatus], None] = lambda status: None,
        policy: RestartPolicy | None = None,
        grace_s: float = 35.0,
    ) -> None:
        self._on_event = on_event
        self._policy = policy or RestartPolicy()
        self._grace_s = grace_s
        self._processes: dict[str, SupervisedProcess] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._stop_grace_s: float | None = None
        self._crash: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add(self, *specs: ProcessSpec) -> None:
        """Start processes; ValueError for a name that is already running."""
        with self._changed:
            if self._closing:
                raise ValueError("the supervisor is stopping and starts nothing more")
            for spec in specs:
                present = self._processes.get(spec.name)
                if present is not None and present.state not in ENDED:
                    raise ValueError(f"a process named {spec.name!r} is already running")
                self._processes[spec.name] = SupervisedProcess(spec, self._policy, self._grace_s, self._report)
            self._changed.notify_all()

    def statuses(self) -> tuple[ProcessStatus, ...]:
        """A snapshot of every process, in the order they were added."""
        with self._changed:
            return tuple(process.status for process in self._processes.values())

    def wait_ready(self, *names: str, timeout_s: float = 300.0) -> None:
        """Block until the named processes (all, without names) serve.

        LaunchError if one fails, or if one does not serve in time; it holds the last log line.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            waiting = [s for s in self.statuses() if not names or s.name in names]
            self.raise_failure(*names)
            waiting = [status for status in waiting if status.state != ProcessState.SERVING]
            if not waiting:
                return
            if time.monotonic() >= deadline:
                late = waiting[0]
                raise LaunchError(f"{late.name} did not serve within {timeout_s:g} s (log: {late.log_path})")
            self._wait_for_change()

    def raise_failure(self, *names: str) -> None:
        """LaunchError if one of the named processes (any, without names) has failed for good."""
        if self._crash is not None:
            raise LaunchError(f"the supervisor itself failed: {self._crash!r}") from self._crash
        for status in self.statuses():
            if status.state == ProcessState.FAILED and (not names or status.name in names):
                raise LaunchError(f"{status.name}: {status.message} (log: {status.log_path})")

    def raise_late(self, timeout_s: float) -> None:
        """LaunchError if a process has been starting (or restarting) for longer than `timeout_s`."""
        for status in self.statuses():
            if status.state == ProcessState.STARTING and time.monotonic() - status.since > timeout_s:
                raise LaunchError(f"{status.name} did not serve within {timeout_s:g} s (log: {status.log_path})")

    def remove(self, name: str) -> None:
        """Stop one process and forget it; returns once it has ended."""
        process = self._processes[name]
        process.request_stop()
        while process.state not in ENDED and self._thread.is_alive():
            self._wait_for_change()
        with self._changed:
            del self._processes[name]

    def stop(self, grace_s: float | None = None) -> None:
        """Stop all processes and return once they have ended; `grace_s` shortens the wait before SIGKILL.

        A KeyboardInterrupt while it waits (a second ctrl-C) kills them at once.
        """
        self.request_stop(grace_s)
        try:
            self._join()
        except KeyboardInterrupt:
            self.request_stop(0)
            self._join()
            raise

    def request_stop(self, grace_s: float | None = None) -> None:
        """What `stop` does, without waiting; asked again with 0 it kills at once."""
        with self._changed:
            self._closing, self._stop_grace_s = True, grace_s
            self._ask_to_stop()
            self._changed.notify_all()

    def _ask_to_stop(self) -> None:
        """Ask those that stop first while there are any, then the others; with grace 0 all at once."""
        going = [process for process in self._processes.values() if process.state not in ENDED]
        first = [process for process in going if process.spec.stops_first]
        for process in going if self._stop_grace_s == 0 else first or going:
            process.request_stop(self._stop_grace_s)

    def _join(self) -> None:
        if self._thread.is_alive():
            self._thread.join()

    def _wait_for_change(self) -> None:
        with self._changed:
            self._changed.wait(TICK_S)

    def _report(self, status: ProcessStatus) -> None:
        self._on_event(status)
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    processes = list(self._processes.values())
                    if self._closing and all(process.state in ENDED for process in processes):
                        return
                    if self._closing:
                        self._ask_to_stop()
                for process in processes:
                    process.tick()
                self._wait_for_change()
        except BaseException as error:  # kept for whoever waits; the end of this thread ends the children too
            self._crash = error
            raise
