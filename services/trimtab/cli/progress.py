"""A training run's progress: a bar with the main metrics on a terminal, one line per step without one."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

MAIN_METRICS: Mapping[str, tuple[str, ...]] = {
    "sft": ("loss", "validation_loss", "learning_rate"),
    "reward": ("loss", "pair_accuracy", "validation_pair_accuracy", "learning_rate"),
    "ppo": ("normalized_score_mean", "kl_nats_per_sequence", "entropy_mean", "loss_policy", "loss_value"),
}
SHOWN_WITHOUT_MAIN = 4


class RunProgress:
    """Shows steps as they are done. On a pipe each step is one line `step 3/100 loss=2.31 …`."""

    def __init__(self, stage: str, console: Console | None = None) -> None:
        self._stage = stage
        self._console = console or Console()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(stage, total=None, metrics="")

    def __enter__(self) -> RunProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int, total_steps: int, values: Mapping[str, float]) -> None:
        """One step is done; 0 `total_steps` means that nobody knows how many there will be."""
        metrics = format_metrics(self._stage, values)
        if self._bar:
            self._bar.update(self._task, completed=step, total=total_steps or None, metrics=metrics)
        else:
            self.say(f"step {step}/{total_steps or '?'} {metrics}")

    def activity(self, text: str) -> None:
        """What the run is doing now; only a terminal shows it, beside the bar."""
        if self._bar:
            self._bar.update(self._task, description=f"{self._stage}: {text}")

    def say(self, text: str) -> None:
        """A line that stays, above the bar if there is one."""
        self._console.print(Text(text), soft_wrap=True)


def format_metrics(stage: str, values: Mapping[str, float]) -> str:
    """The stage's main metrics that `values` has, else its first few, as `name=1.234`."""
    names = [name for name in MAIN_METRICS.get(stage, ()) if name in values]
    names = names or sorted(values)[:SHOWN_WITHOUT_MAIN]
    return " ".join(f"{name}={values[name]:.4g}" for name in names)
