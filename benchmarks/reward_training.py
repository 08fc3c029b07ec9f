"""Reward-model training, trimtab beside TRL's RewardTrainer: the same comparisons, model, batch and cores, in turn.

    python -m benchmarks.reward_training --peer-env ~/trl-env --out reward.json
    python -m benchmarks.reward_training --peer-python ~/trl-env/bin/python --dtypes bfloat16

It prints comparisons (pairs) a second of TRL, of trimtab, and of trimtab with the prompt computed anew for each
response. A step takes the pairs of 8 rankings of 9: 288 pairs for TRL, 72 responses for us. All sides must agree on the
loss of the first step. Figures hold for a quiet machine only: it waits until others are quiet and says what it saw.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, wait_until_quiet
from benchmarks.models import Work, write_work
from benchmarks.peers.environment import ensure_environment
from benchmarks.ppo_trl import REQUIREMENTS
from benchmarks.reward_trimtab import FORWARDS
from benchmarks.reward_work import RankingWork, TrainingCase, TrainingRun, write_rankings
from trimtab.rounds.launchers.services import thread_environment

PEER = Path(__file__).parent / "peers" / "trl_reward.py"
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
TINY = Work(layers=2)
TINY_RANKINGS = RankingWork(sets_per_step=8, steps=2)


@dataclass(frozen=True)
class Comparison:
    """All sides of one dtype; `pairs_per_second` by side from the median step, `ratio` to the first side, the peer."""

    dtype: str
    threads: int
    pairs_per_second: dict[str, float]
    ratio: dict[str, float]
    runs: tuple[TrainingRun, ...]
    others_busy_cores: tuple[float, ...]


def run_trl(python: Path, case: TrainingCase, steps: int, scratch: Path) -> TrainingRun:
    """TRL's side; it is slow, so it takes only the first `steps` steps of the comparisons."""
    options = {"--steps": steps, "--pairs-per-step": case.rankings.pairs_per_step}
    return _run([str(python), str(PEER)], options, case, scratch, {"HF_HUB_OFFLINE": "1"})


def run_trimtab(forward: str, case: TrainingCase, scratch: Path) -> TrainingRun:
    """Our side, with the prompt of a ranking "shared" or "separate"."""
    options = {"--forward": forward, "--sets-per-step": case.rankings.sets_per_step}
    command = [sys.executable, "-m", "benchmarks.reward_trimtab"]
    return _run(command, options, case, scratch, thread_environment(case.threads))


def _run(
    command: list[str], options: Mapping[str, object], case: TrainingCase, scratch: Path, environment: dict[str, str]
) -> TrainingRun:
    scratch.mkdir(parents=True)
    out, log = scratch / "run.json", scratch / "run.log"
    options = dict(options) | {
        "--model-dir": case.folder.reward,
        "--comparisons": case.comparisons,
        "--dtype": case.dtype,
        "--threads": case.threads,
        "--out": out,
    }
    command = [*command, *(str(part) for option in options.items() for part in option)]
    with log.open("w") as lines:
        ended = subprocess.run(
            command, stdout=lines, stderr=subprocess.STDOUT, env=os.environ | environment, check=False
        )
    if ended.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed; the end of {log}:\n{log.read_text()[-2000:]}")
    result = json.loads(out.read_text())
    return TrainingRun(**result | {"step_seconds": tuple(result["step_seconds"][1:])})


def compare(case: TrainingCase, python: Path, options: argparse.Namespace, scratch: Path) -> Comparison:
    """Run all sides in turn, `options.rounds` times; RuntimeError if they do not agree on the first step's loss."""
    runs: list[TrainingRun] = []
    busy: list[float] = []
    for number in range(options.rounds):
        sides = [
            lambda at: run_trl(python, case, min(options.peer_steps, case.rankings.steps), at),
            *(lambda at, forward=forward: run_trimtab(forward, case, at) for forward in FORWARDS),
        ]
        for place, side in enumerate(sides):
            busy.append(wait_until_quiet(options.quiet_cores, timeout_s=options.quiet_timeout_s))
            runs.append(side(scratch / f"{number}-{place}"))
            print(f"  {runs[-1].side}: {median(runs[-1].step_seconds):.2f} s a step", file=sys.stderr)
    losses = [run.first_loss for run in runs]
    if max(losses) - min(losses) > LOSS_TOLERANCE[case.dtype]:
        raise RuntimeError(f"the sides do not do the same work: first losses {losses}")
    sides_seconds = {
        name: median(second for run in runs if run.side == name for second in run.step_seconds)
        for name in dict.fromkeys(run.side for run in runs)
    }
    speeds = {name: case.rankings.pairs_per_step / seconds for name, seconds in sides_seconds.items()}
    peer = next(iter(speeds.values()))
    return Comparison(
        dtype=case.dtype,
        threads=case.threads,
        pairs_per_second=speeds,
        ratio={name: speed / peer for name, speed in speeds.items()},
        runs=tuple(runs),
        others_busy_cores=tuple(busy),
    )


def show(console: Console, result: Comparison) -> None:
    """One table."""
    table = Table(title=f"Reward-model training, {result.dtype}, {result.threads} threads")
    for column in ("side", "pairs/s", "of the peer's", "cores used", "peak MB", "first loss"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, speed in result.pairs_per_second.items():
        runs = [run for run in result.runs if run.side == name]
        table.add_row(
            name,
            f"{speed:.1f}",
            f"{result.ratio[name]:.1f}",
            f"{runs[0].cores_used:.2f}",
            f"{max(run.peak_rss_mb for run in runs):.0f}",
            f"{runs[0].first_loss:.5f}",
        )
    console.print(table)
    console.print(f"others kept at most {max(result.others_busy_cores):.2f} cores busy before a run\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peer = parser.add_mutually_exclusive_group(required=True)
    peer.add_argument("--peer-python", type=Path, help="interpreter of an environment that holds TRL 1.12.0")
    peer.add_argument("--peer-env", type=Path, help="folder of TRL's environment; made with pip if it is missing")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores each side may use")
    parser.add_argument("--steps", type=int, default=RankingWork.steps, help="of our run; the first is not measured")
    parser.add_argument("--peer-steps", type=int, default=3, help="of the peer's run; the first is not measured")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, in turn")
    parser.add_argument("--smoke", action="store_true", help="tiny work: shows that all sides run, no more")
    parser.add_argument("--quiet-cores", type=float, default=0.1, help="others may keep this many cores busy")
    parser.add_argument("--quiet-timeout-s", type=float, default=120, help="how long to wait for them")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    return parser.parse_args()


def write_report(path: Path, work: Work, rankings: RankingWork, results: Sequence[Comparison]) -> None:
    """Every figure so far, with the machine, the commit and the command."""
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.reward_training", *sys.argv[1:]]),
        "machine": asdict(describe_machine()),
        "work": asdict(work),
        "rankings": asdict(rankings),
        "comparisons": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(report, indent=1))


def main() -> None:
    options = parse_arguments()
    python = options.peer_python or ensure_environment(options.peer_env.expanduser(), REQUIREMENTS)
    work, rankings = (TINY, TINY_RANKINGS) if options.smoke else (Work(), RankingWork(steps=options.steps))
    console = Console()
    results: list[Comparison] = []
    with tempfile.TemporaryDirectory(prefix="reward-training-") as root:
        folder = write_work(Path(root) / "work", work)
        comparisons = write_rankings(Path(root) / "comparisons.jsonl", work, rankings)
        for dtype in options.dtypes:
            case = TrainingCase(folder, comparisons, rankings, dtype, options.threads)
            results.append(compare(case, python, options, Path(root) / dtype))
            show(console, results[-1])
            if options.out:
                write_report(options.out, work, rankings, results)


if __name__ == "__main__":
    main()
