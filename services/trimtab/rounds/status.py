"""Where a run of rounds stands, read from its folder alone: while it runs, after it ended, after it was killed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from trimtab.rounds.journal import Event, Journal, JournalError, is_running
from trimtab.rounds.recipe import Recipe
from trimtab.rounds.stages.plan import stage_names

SHOWN = {
    "sft": ("loss", "validation_loss"),
    "rank": ("rankings", "tied_share"),
    "sample": ("answers",),
    "reward": ("validation_pair_accuracy",),
    "ppo": ("normalized_score_mean", "kl_nats_per_sequence"),
    "evaluate": ("judge_win_rate", "gold_win_rate", "win_rate_against_previous", "kl_nats_per_response"),
    "publish": ("best_round",),
}


@dataclass(frozen=True)
class StageStatus:
    """One stage: `state` is done, running, waiting, failed, cut off or to do; `detail` its main figures or why."""

    name: str
    state: str
    detail: str
    seconds: float | None


@dataclass(frozen=True)
class RoundsStatus:
    """A run: `state` is running, finished or stopped; `best` the published best policy, "" before SFT is done."""

    name: str
    folder: Path
    state: str
    best: str
    stages: tuple[StageStatus, ...]


def read_status(folder: Path) -> RoundsStatus:
    """Read a run's folder without disturbing who works in it. Raises JournalError where there is no run."""
    running = is_running(folder)
    journal = Journal(folder)
    begun = journal.begun
    if begun is None or begun.recipe is None:
        raise JournalError(f"{folder} holds no run of rounds; `trimtab rounds run RECIPE --folder {folder}` begins one")
    recipe = Recipe.model_validate(begun.recipe)
    names = stage_names(max(recipe.rounds, _highest_round(journal)))
    stages = tuple(_stage(journal, folder, recipe, name, running) for name in names)
    best = [event.outputs["best"].partition(" ")[0] for event in journal.events if "best_round" in event.metrics]
    finished = all(stage.state == "done" for stage in stages)
    state = "running" if running else "finished" if finished else "stopped"
    return RoundsStatus(recipe.name, folder, state, best[-1] if best else "", stages)


def _highest_round(journal: Journal) -> int:
    return max((int(event.stage.partition("/")[0]) for event in journal.events if event.stage), default=0)


def _stage(journal: Journal, folder: Path, recipe: Recipe, name: str, running: bool) -> StageStatus:
    own = [event for event in journal.events if event.stage == name]
    if not own:
        return StageStatus(name, "to do", "", None)
    last, started = own[-1], [event for event in own if event.event == "started"][-1]
    if last.event == "done":
        return StageStatus(name, "done", _figures(last), (last.at - started.at).total_seconds())
    if last.event == "failed":
        return StageStatus(name, "failed", last.detail, (last.at - started.at).total_seconds())
    if not running:
        return StageStatus(name, "cut off", "it will be started again", None)
    seconds = (datetime.now(UTC) - started.at).total_seconds()
    if last.event == "waiting" and last.detail:
        return StageStatus(name, "waiting", last.detail, seconds)
    return StageStatus(name, "running", _progress(folder, recipe, name, started), seconds)


def _figures(event: Event) -> str:
    stage = event.stage.partition("/")[2]
    shown = [f"{name}={event.metrics[name]:.4g}" for name in SHOWN.get(stage, ()) if name in event.metrics]
    if stage == "publish":
        shown.append(f"best={event.outputs['best'].partition(' ')[0]}")
    return " ".join(shown)


def _progress(folder: Path, recipe: Recipe, name: str, started: Event) -> str:
    """The newest step that the trainer wrote down; "" for stages that do not train."""
    number, _, stage = name.partition("/")
    suffix = "" if started.attempt == 1 else f"-attempt{started.attempt}"
    metrics = folder / "runs" / f"{recipe.name}-r{number}-{stage}{suffix}" / "metrics.jsonl"
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return ""
    whole = [line for line in lines if line.endswith("\n")]
    return f"step {json.loads(whole[-1])['step']}" if whole else ""
