"""Measures one side at one task and shape, in a process of its own, and prints a JSON line; run by `kernels`.

python -m benchmarks.kernels_worker SIDE TASK ROWSxWIDTHxVOCAB DTYPE DEVICE REPEATS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.kernels_sides import Inputs, Shape, make_inputs, step_of

GEMMS = {"forward": 1, "train": 3, "ppo": 3, "logits": 0, "kl": 4}
"""Matrix products of 2NDV a task cannot do without; the share of the ceiling counts these alone."""
CHECKED_ROWS = 64


def main(side: str, task: str, shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """Seconds, memory and error of one side; seconds of the bare matrix product for side `ceiling`."""
    if side == "ceiling":
        return {"seconds": _ceiling_seconds(shape, dtype, device, repeats), "copy_gb_s": _copy_rate(device, repeats)}
    inputs = make_inputs(shape, task, dtype, device)
    step = step_of(side, task, inputs)
    if step is None:
        return {"missing": True}
    before = _start_peak(device)
    seconds = _median_seconds(step, device, repeats)
    flops = GEMMS[task] * 2 * shape.rows * shape.width * shape.vocab
    return {
        "seconds": seconds,
        "extra_mb": (_peak_bytes(device) - before) / 2**20,
        "gflops": flops / seconds / 1e9,
        "error": _error(step(), inputs) if task == "forward" else None,
    }


def _median_seconds(step: Callable[[], Any], device: str, repeats: int) -> float:
    times = []
    for number in range(repeats + 1):  # the first compiles and warms up
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if number:
            times.append(time.perf_counter() - start)
    return median(times)


def _ceiling_seconds(shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> float:
    hidden = torch.randn(shape.rows, shape.width, device=device).to(dtype)
    weight = torch.randn(shape.vocab, shape.width, device=device).to(dtype)
    return _median_seconds(lambda: torch.mm(hidden, weight.T), device, repeats)


def _copy_rate(device: str, repeats: int) -> float:
    source = torch.empty(64 << 20 if device == "cpu" else 1 << 30, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source), device, repeats) / 1e9


def _start_peak(device: str) -> int:
    """Begin a new peak; returns the bytes in use now."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS; Linux only
        return _process_bytes("VmRSS")
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_bytes(device: str) -> int:
    return _process_bytes("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def _process_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def _error(result: Any, inputs: Inputs) -> float | None:
    """Largest error of the log-probs of some rows against float64; None for a side that gives a mean only."""
    logprob_N = result[0] if isinstance(result, tuple) else result
    if logprob_N.dim() == 0:
        return None
    logits = inputs.hidden_ND[:CHECKED_ROWS].double() @ inputs.weight_VD.double().T
    want = torch.log_softmax(logits, 1).gather(1, inputs.targets_N[:CHECKED_ROWS, None])[:, 0]
    return float((logprob_N[:CHECKED_ROWS].double() - want).abs().max())


if __name__ == "__main__":
    side, task, sizes, dtype_name, where, count = sys.argv[1:]
    shape = Shape(*(int(size) for size in sizes.split("x")))
    print(json.dumps(main(side, task, shape, getattr(torch, dtype_name), where, int(count))))
