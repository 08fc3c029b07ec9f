"""One run of a stage: where it is, what it reported, and the requests to pause, checkpoint or stop it.

The stage runs on its own thread and calls `report`, `doing` and `between_steps`; the service's event loop
reads `snapshot` and `events_after`, and is told of changes by listeners. What is computed is not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from typing import TypeVar

from trimtab_client import ModelVersion

T = TypeVar("T")
LOOK_FOR_STOP_S = 0.1


class RunState(Enum):
    """Values are those of `trimtab.v1.RunState`."""

    RUNNING = 1
    PAUSED = 2
    SUCCEEDED = 3
    FAILED = 4
    STOPPED = 5

    @property
    def finished(self) -> bool:
        return self in (RunState.SUCCEEDED, RunState.FAILED, RunState.STOPPED)


class StopRun(Exception):
    """Raised in the stage's thread, between two steps or while it waits for a service, when a stop was asked for."""


class RunFailedError(Exception):
    """The stage cannot go on; the message is the reason a person reads."""


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step; names as in docs/metrics.md."""

    step: int
    total_steps: int
    values: dict[str, float]
    time: datetime


@dataclass(frozen=True)
class RunSnapshot:
    """A run's status at one moment."""

    run_id: str
    stage: str
    state: RunState = RunState.RUNNING
    step: int = 0
    total_steps: int = 0
    activity: str = "starting"
    error: str = ""
    published: tuple[ModelVersion, ...] = ()
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished_at: datetime | None = None


class Run:
    """Status, history and control of one run; every method may be called from any thread."""

    def __init__(self, run_id: str, stage: str) -> None:
        self._changed = threading.Condition()
        self._snapshot = RunSnapshot(run_id, stage)
        self._events: list[StepMetrics] = []
        self._activity = self._snapshot.activity
        self._hindrances: dict[str, str] = {}
        self._listeners: list[Callable[[], None]] = []
        self._pause = self._stop = False
        self._checkpoints: list[Future[tuple[ModelVersion, ...]]] = []

    # What the stage says.

    def doing(self, activity: str) -> None:
        """Say what is being done or waited for."""
        with self._changed:
            self._activity = activity
        self._tell_activity()

    def hindered(self, by: str, reason: str) -> None:
        """Say beside that what keeps it from going on, and "" once it does."""
        with self._changed:
            self._hindrances.pop(by, None)
            if reason:
                self._hindrances[by] = reason
        self._tell_activity()

    def plan(self, total_steps: int) -> None:
        """Say how many steps there will be."""
        self._update(total_steps=total_steps)

    def report(self, metrics: StepMetrics) -> None:
        """Append the metrics of a finished step."""
        with self._changed:
            self._events.append(metrics)
        self._update(step=metrics.step)

    def recall(self, events: Sequence[StepMetrics], published: Sequence[ModelVersion]) -> None:
        """Take up what the run reported and published before it was cut off."""
        with self._changed:
            self._events = list(events)
        self._update(step=events[-1].step if events else 0, published=tuple(published))

    def published(self, version: ModelVersion) -> None:
        """Note a published version; one that is known already changes nothing."""
        if version not in self.snapshot.published:
            self._update(published=(*self.snapshot.published, version))

    def between_steps(self, publish: Callable[[], ModelVersion]) -> None:
        """Serve what was asked for meanwhile: checkpoints (by `publish`), a pause, a stop (raises StopRun)."""
        while True:
            if asked := self._take_checkpoints():
                try:
                    published = (publish(),)
                except Exception as error:
                    for request in asked:
                        request.set_exception(error)
                    raise
                for request in asked:
                    request.set_result(published)
            with self._changed:
                if self._stop:
                    raise StopRun
                paused = self._pause
                if paused and not self._checkpoints and self._snapshot.state is RunState.PAUSED:
                    self._changed.wait(timeout=1.0)
            if not paused:
                if self.snapshot.state is RunState.PAUSED:
                    self._update(state=RunState.RUNNING, activity="going on")
                return
            if self.snapshot.state is not RunState.PAUSED:
                self._update(state=RunState.PAUSED, activity="paused")

    def check_stop(self) -> None:
        """Raise StopRun where a stop was asked for: within a step, while it waits for others."""
        with self._changed:
            if self._stop:
                raise StopRun

    def wait(self, work: Future[T]) -> T:
        """The result of work that another thread does, or what it raised; StopRun where a stop is asked for first."""
        while not futures.wait([work], timeout=LOOK_FOR_STOP_S).done:
            self.check_stop()
        return work.result()

    def finish(self, state: RunState, error: str = "") -> None:
        """End the run."""
        activity = {RunState.SUCCEEDED: "done", RunState.STOPPED: "stopped"}.get(state, "failed")
        self._update(state=state, error=error, activity=activity, finished_at=datetime.now(UTC))
        for request in self._take_checkpoints():
            if state is RunState.SUCCEEDED:
                request.set_result(self.snapshot.published[-1:])
            else:
                request.set_exception(RunFailedError(f"the run ended ({activity}) before it reached a checkpoint"))

    # What others ask.

    @property
    def snapshot(self) -> RunSnapshot:
        with self._changed:
            return self._snapshot

    def events_after(self, position: int) -> list[StepMetrics]:
        """Reported steps from the list position on."""
        with self._changed:
            return self._events[position:]

    def pause(self) -> None:
        """Ask to hold after the current step."""
        self._ask(pause=True)

    def resume(self) -> None:
        """Ask to go on."""
        self._ask(pause=False)

    def stop(self) -> None:
        """Ask to end after the current step."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    def checkpoint(self) -> Future[tuple[ModelVersion, ...]]:
        """Ask for the weights to be published after the current step."""
        request: Future[tuple[ModelVersion, ...]] = Future()
        with self._changed:
            if self._snapshot.state.finished:
                request.set_exception(RunFailedError("the run has ended; what it published stays in the store"))
            else:
                self._checkpoints.append(request)
                self._changed.notify_all()
        return request

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` (from any thread) on every change, until the returned function is called."""
        with self._changed:
            self._listeners.append(listener)

        def forget() -> None:
            with self._changed:
                self._listeners.remove(listener)

        return forget

    def _take_checkpoints(self) -> list[Future[tuple[ModelVersion, ...]]]:
        """What was asked for, without what nobody waits for any more; from here on none of it can be cancelled."""
        with self._changed:
            pending, self._checkpoints = self._checkpoints, []
        return [request for request in pending if request.set_running_or_notify_cancel()]

    def _tell_activity(self) -> None:
        with self._changed:
            shown = "; ".join([self._activity, *self._hindrances.values()])
        self._update(activity=shown)

    def _ask(self, *, pause: bool) -> None:
        with self._changed:
            self._pause = pause
            self._changed.notify_all()

    def _update(self, **changes: object) -> None:
        with self._changed:
            self._snapshot = replace(self._snapshot, **changes)  # type: ignore[arg-type]
            listeners = tuple(self._listeners)
            self._changed.notify_all()
        for listener in listeners:
            listener()
