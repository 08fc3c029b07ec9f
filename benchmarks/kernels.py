"""The kernels beside plain torch, torch.compile and, on a GPU and where installed, Liger, cut-cross-entropy and verl.

    python -m benchmarks.kernels --out kernels.json --plot kernels.png [--shapes 1024x576x49152 …] [--dtype float32]

Each figure is from a process of its own: median seconds, the memory the step adds at its peak, the rate in GFLOP/s of
the products that the task cannot do without, its share of the rate of one `torch.mm` in the same run, and the largest
error of log-probs against float64. What runs out of memory or is not installed is left out by name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels_sides import SIDES, TASKS
from benchmarks.machine import describe_machine

SHAPES = {
    "cuda": (
        "8192x4096x128256",
        "32768x4096x128256",
        "8192x2048x151936",
        "32768x2048x151936",
        "8192x2048x62080",
        "8192x2048x248320",
    ),
    "cpu": ("512x576x49152", "2048x576x49152"),
}


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a shape, task and side, printed as they come."""
    records = []
    for shape in arguments.shapes:
        ceiling = _measure("ceiling", "forward", shape, arguments)
        records.append({"shape": shape, "task": "mm", "side": "ceiling", **ceiling})
        rows, width, vocab = (int(size) for size in shape.split("x"))
        rate = 2 * rows * width * vocab / ceiling["seconds"] / 1e9
        print(f"{shape}: torch.mm {rate:,.0f} GFLOP/s, copy {ceiling['copy_gb_s']:.1f} GB/s", flush=True)
        for task in arguments.tasks:
            for side in arguments.sides:
                record = _measure(side, task, shape, arguments)
                if "seconds" not in record:
                    print(f"  {task:8} {side:8} {record}", flush=True)
                    continue
                record["share_of_mm"] = record["gflops"] / rate
                records.append({"shape": shape, "task": task, "side": side, **record})
                print(
                    f"  {task:8} {side:8} {record['seconds'] * 1e3:10.1f} ms {record['extra_mb']:8.0f} MB"
                    f" {record['share_of_mm']:6.2f} of mm  error {record['error']}",
                    flush=True,
                )
    return records


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Time and memory of each task at the last shape, a bar a side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = records[-1]["shape"]
    here = [record for record in records if record["shape"] == shape and record["side"] != "ceiling"]
    tasks, sides = (list(dict.fromkeys(record[key] for record in here)) for key in ("task", "side"))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4))
    for axes, key, scale, label in zip(panels, ("seconds", "extra_mb"), (1e3, 1), ("ms", "peak MB"), strict=True):
        for number, side in enumerate(sides):
            values = {record["task"]: record[key] * scale for record in here if record["side"] == side}
            places = [tasks.index(task) + number * 0.8 / len(sides) for task in values]
            axes.bar(places, list(values.values()), width=0.8 / len(sides), label=side, align="edge")
        axes.set_xticks([place + 0.4 for place in range(len(tasks))], tasks)
        axes.set_ylabel(label)
        axes.set_title(shape)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _measure(side: str, task: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.kernels_worker", side, task, shape, arguments.dtype]
    command += [arguments.device, str(arguments.repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="The kernels beside other implementations.")
    parser.add_argument("--out", type=Path, required=True, help="JSON of all figures")
    parser.add_argument("--plot", type=Path, help="PNG of the last shape")
    parser.add_argument("--shapes", nargs="+", default=SHAPES[device], help="ROWSxWIDTHxVOCAB")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES if device == "cuda" else SIDES[:2])
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16" if device == "cuda" else "float32"
    )
    parser.add_argument("--device", default=device)
    parser.add_argument("--repeats", type=int, default=5 if device == "cuda" else 3)
    arguments = parser.parse_args(argv)
    records = run(arguments)
    facts = {
        "machine": asdict(describe_machine()),
        "device": device,
        "dtype": arguments.dtype,
        "torch": torch.__version__,
    }
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    arguments.out.write_text(json.dumps({**facts, "records": records}, indent=1) + "\n")
    if arguments.plot:
        plot(records, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
