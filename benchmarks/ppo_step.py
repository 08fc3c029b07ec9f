"""One PPO update, trimtab beside TRL's last PPOTrainer: the same models, prompts, lengths, cores, in one run, in turn.

    python -m benchmarks.ppo_step --peer-env ~/trl-env --out ppo.json --plot ppo.png
    python -m benchmarks.ppo_step --peer-python ~/trl-env/bin/python --dtypes float32 --cases ragged

It prints each side's seconds by stage, their ratio, and the share of the machine's own matrix-multiplication rate that
training reached. Figures hold for a quiet machine only: it waits until others are quiet and says what it saw. The work
is in models.py, the meaning of each stage in sides.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gemm import GemmRate, measure_apart, training_flops
from benchmarks.machine import describe_machine, wait_until_quiet
from benchmarks.models import Work, WorkFolder, write_work
from benchmarks.peers.environment import ensure_environment
from benchmarks.ppo_step_plot import draw
from benchmarks.ppo_trimtab import run_trimtab
from benchmarks.ppo_trl import REQUIREMENTS, run_trl
from benchmarks.sides import COMPARED, PARTS_OF_EXPERIENCE, STAGES, Case, SideRun, medians

TINY = Work(layers=2, prompts=8, minibatch_size=4, inner_epochs=2, response_tokens=16, shortest_response_tokens=3)
Side = Callable[[WorkFolder, Case, int, Path], SideRun]


@dataclass(frozen=True)
class Comparison:
    """Both sides of one case.

    Attributes:
        ratio: the peer's seconds over ours, by stage that both have; above 1 where we are faster.
        training_tflop: useful matrix-multiplication work of an update's training, in 10^12 operations.
        gemm_share: of the machine's rate at these shapes and threads, reached in training, by side.
        others_busy_cores: what the quietness check saw before each run.
    """

    case: Case
    seconds: dict[str, dict[str, float]]
    ratio: dict[str, float]
    training_tflop: float
    gemm: GemmRate
    gemm_share: dict[str, float]
    runs: tuple[SideRun, ...]
    others_busy_cores: tuple[float, ...]


def compare(
    folder: WorkFolder, case: Case, sides: Sequence[Side], options: argparse.Namespace, scratch: Path
) -> Comparison:
    """Run the sides in turn, `options.rounds` times each; the first of `sides` is the peer."""
    runs: list[SideRun] = []
    busy: list[float] = []
    gemm = measure_apart(folder.work, case.dtype, case.threads)
    for number in range(options.rounds):
        for place, side in enumerate(sides):
            busy.append(wait_until_quiet(options.quiet_cores, timeout_s=options.quiet_timeout_s))
            runs.append(side(folder, case, options.updates, scratch / f"{number}-{place}"))
            print(f"  {runs[-1].side}: {medians(runs[-1:])['update']:.2f} s an update", file=sys.stderr)
    names = list(dict.fromkeys(run.side for run in runs))
    seconds = {name: medians([run for run in runs if run.side == name]) for name in names}
    peer, ours = (seconds[name] for name in names)
    lengths_B = folder.response_lengths_B if case.ragged else (folder.work.response_tokens,) * folder.work.prompts
    flops = training_flops(folder.work, lengths_B)
    return Comparison(
        case=case,
        seconds=seconds,
        ratio={stage: peer[stage] / ours[stage] for stage in COMPARED},
        training_tflop=flops / 1e12,
        gemm=gemm,
        gemm_share={name: flops / seconds[name]["train"] / (gemm.training * 1e9) for name in names},
        runs=tuple(runs),
        others_busy_cores=tuple(busy),
    )


def show(console: Console, result: Comparison) -> None:
    """One table by stage, and what a reader needs beside it."""
    names = list(result.seconds)
    table = Table(title=f"PPO update, {result.case} (seconds, medians)")
    for column in ("stage", *names, "ratio"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in ("update", *STAGES):
        label = f"  {stage}" if stage in PARTS_OF_EXPERIENCE else stage
        ratio = f"{result.ratio[stage]:.2f}" if stage in result.ratio else ""
        table.add_row(label, *(f"{result.seconds[name][stage]:.2f}" for name in names), ratio)
    console.print(table)
    for name in names:
        runs = [run for run in result.runs if run.side == name]
        console.print(
            f"{name}: {sum(len(run.updates) for run in runs)} updates measured, {runs[0].optimizer_steps:g} optimizer "
            f"steps each, {max(run.peak_rss_mb for run in runs):.0f} MB at most, {runs[0].cores_used:.2f} cores used; "
            f"training at {result.gemm_share[name]:.0%} of the machine's matrix-multiplication rate"
        )
    console.print(
        f"machine: {result.gemm.training:.0f} GFLOP/s at these shapes and threads, {result.training_tflop:.2f} TFLOP "
        f"a training; others kept at most {max(result.others_busy_cores):.2f} cores busy before a run\n"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peer = parser.add_mutually_exclusive_group(required=True)
    peer.add_argument("--peer-python", type=Path, help="interpreter of an environment that holds TRL 1.12.0")
    peer.add_argument("--peer-env", type=Path, help="folder of TRL's environment; made with pip if it is missing")
    parser.add_argument("--cases", nargs="+", choices=("equal", "ragged"), default=["equal", "ragged"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores each side may use")
    parser.add_argument("--vocab-size", type=int, default=Work.vocab_size)
    parser.add_argument("--smoke", action="store_true", help="tiny work: shows that both sides run, no more")
    parser.add_argument("--updates", type=int, default=4, help="of one run; the first is not measured")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, in turn")
    parser.add_argument("--quiet-cores", type=float, default=0.1, help="others may keep this many cores busy")
    parser.add_argument("--quiet-timeout-s", type=float, default=120, help="how long to wait for them")
    parser.add_argument("--micro-batch-tokens", type=int, help="of our trainer, instead of its default")
    parser.add_argument(
        "--old-logprobs",
        choices=("trainer", "generator"),
        default="generator",
        help="of our trainer; TRL's are generated",
    )
    parser.add_argument("--trainer-env", nargs="*", default=[], metavar="NAME=VALUE", help="for our trainer process")
    parser.add_argument("--folder", type=Path, help="keep models, logs and runs here; else they are thrown away")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    parser.add_argument("--plot", type=Path, help="PNG with the stages of each side")
    return parser.parse_args()


def write_report(path: Path, work: Work, results: Sequence[Comparison]) -> None:
    """Every figure so far, with the machine, the commit and the command."""
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.ppo_step", *sys.argv[1:]]),
        "machine": asdict(describe_machine()),
        "work": asdict(work),
        "comparisons": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(report, indent=1))


@contextmanager
def scratch_folder(kept: Path | None) -> Iterator[Path]:
    """A fresh folder below `kept` that stays, or a temporary one."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix="ppo-step-", dir=kept.resolve()))
        return
    with tempfile.TemporaryDirectory(prefix="ppo-step-") as folder:
        yield Path(folder)


def main() -> None:
    options = parse_arguments()
    python = options.peer_python or ensure_environment(options.peer_env.expanduser(), REQUIREMENTS)
    environment = dict(setting.split("=", 1) for setting in options.trainer_env)

    def peer(folder: WorkFolder, case: Case, updates: int, scratch: Path) -> SideRun:
        return run_trl(python, folder, case, updates, scratch)

    def ours(folder: WorkFolder, case: Case, updates: int, scratch: Path) -> SideRun:
        tokens = options.micro_batch_tokens
        return run_trimtab(folder, case, updates, scratch, environment, tokens, options.old_logprobs)

    console = Console()
    results: list[Comparison] = []
    with scratch_folder(options.folder) as root:
        folder = write_work(root / "work", TINY if options.smoke else Work(vocab_size=options.vocab_size))
        for dtype in options.dtypes:
            for lengths in options.cases:
                case = Case(dtype, options.threads, ragged=lengths == "ragged")
                print(f"{case}:", file=sys.stderr)
                scratch = root / f"{dtype}-{lengths}"
                results.append(compare(folder, case, (peer, ours), options, scratch))
                show(console, results[-1])
                if options.out:
                    write_report(options.out, folder.work, results)
                if options.plot:
                    draw([(result.case, result.seconds) for result in results], options.plot)


if __name__ == "__main__":
    main()
