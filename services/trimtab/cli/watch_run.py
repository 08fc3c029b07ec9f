"""Start a run at a trainer, show its steps, and see it to its end."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.cli.errors import CommandError
from trimtab.cli.progress import RunProgress
from trimtab.cli.stage_config import StageMessage
from trimtab_client import ChannelOptions, RunStatus, StepMetrics, TrainerClient, Unavailable

LOSSES_WITHOUT_PROGRESS = 3


class RunWatcher:
    """Watches one run at `address`.

    `recover` is called when the trainer is gone: it returns once a trainer serves there again (or raises), and the
    run is then asked for anew. None where nobody brings the trainer back.
    """

    def __init__(
        self,
        address: str,
        stage: str,
        run_id: str,
        config: StageMessage,
        recover: Callable[[], None] | None,
        options: ChannelOptions | None = None,
    ) -> None:
        self._address = address
        self._stage = stage
        self._run_id = run_id
        self._config = config
        self._recover = recover
        self._options = options or ChannelOptions()
        self._step = 0

    def run(self) -> None:
        """Return when the run has succeeded; CommandError when it failed or was stopped by someone else.

        ctrl-C asks the trainer to stop after the current step and is raised again once it has (the command then
        exits 130); a second one is raised at once.
        """
        with RunProgress(self._stage) as progress, TrainerClient(self._address, self._options) as client:
            try:
                status = self._follow(client, progress)
            except KeyboardInterrupt:
                progress.say("stopping after the current step; ctrl-C again leaves at once")
                client.stop(self._run_id)
                self._report(self._watch(client, progress), progress)
                raise
            self._report(status, progress)
        if status.state == "failed":
            raise CommandError(f"run {self._run_id} failed at step {status.step}: {status.error}")
        if status.state == "stopped":
            raise CommandError(f"run {self._run_id} was stopped at step {status.step}")

    def _follow(self, client: TrainerClient, progress: RunProgress) -> RunStatus:
        losses, reached = 0, -1
        while True:
            try:
                client.start(self._run_id, self._config)
                return self._watch(client, progress)
            except Unavailable as error:
                losses = losses + 1 if self._step == reached else 1
                reached = self._step
                if self._recover is None or losses > LOSSES_WITHOUT_PROGRESS:
                    raise
                progress.say(f"the trainer is gone ({error}); waiting for it")
                self._recover()

    def _watch(self, client: TrainerClient, progress: RunProgress) -> RunStatus:
        activity = ""
        for event in client.watch(self._run_id, after_step=self._step):
            if isinstance(event, StepMetrics):
                self._step = event.step
                progress.step(event.step, event.total_steps, event.values)
            elif event.finished:
                return event
            elif event.activity != activity:
                activity = event.activity
                progress.activity(activity)
        raise Unavailable("UNAVAILABLE", f"the stream of run {self._run_id} ended before the run did")

    def _report(self, status: RunStatus, progress: RunProgress) -> None:
        if status.published:
            progress.say(f"published {len(status.published)} version(s), the newest {status.published[-1]}")
        progress.say(f"run {self._run_id} {status.state} at step {status.step}")
