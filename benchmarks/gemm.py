"""The machine's matrix-multiplication rate at the benchmark model's own shapes: the floor that every side stands on.

For each linear layer of the model and a minibatch's tokens it times the three products of training (forward, gradient
of the input, gradient of the weight) as torch runs them, and weighs them by how often they occur. With the useful
FLOPs of an update (attention scores and padding left out) this gives the share of the machine that a trainer reaches.

    python -m benchmarks.gemm --out gemm.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.models import Work


@dataclass(frozen=True)
class Linear:
    """`count` layers of a model that map K features to M for each token."""

    name: str
    in_features: int
    out_features: int
    count: int

    @property
    def flops_per_token(self) -> int:
        """Of one forward through all of them."""
        return 2 * self.in_features * self.out_features * self.count


@dataclass(frozen=True)
class GemmRate:
    """Rates in GFLOP/s: `training` over all products of a training step, `forward` over the forward products alone."""

    dtype: str
    threads: int
    training: float
    forward: float
    by_product: dict[str, float]


def linears(work: Work) -> tuple[Linear, ...]:
    """The model's linear layers, LM head last; queries, keys and values are three products, as in transformers."""
    hidden, inner, layers = work.hidden_size, work.intermediate_size, work.layers
    return (
        Linear("attention", hidden, hidden, 4 * layers),
        Linear("gate_up", hidden, inner, 2 * layers),
        Linear("down", inner, hidden, layers),
        Linear("head", hidden, work.vocab_size, 1),
    )


def forward_flops(work: Work, response_lengths_B: Sequence[int]) -> tuple[int, int]:
    """(backbone, LM head) FLOPs of one forward: all real tokens in the backbone, response tokens in the head."""
    *backbone, head = linears(work)
    response_tokens = sum(response_lengths_B)
    tokens = response_tokens + work.prompt_tokens * len(response_lengths_B)
    return tokens * sum(linear.flops_per_token for linear in backbone), response_tokens * head.flops_per_token


def training_flops(work: Work, response_lengths_B: Sequence[int]) -> int:
    """FLOPs of an update's training: policy and value model, forward and backward (three products a layer)."""
    backbone, head = forward_flops(work, response_lengths_B)
    return work.inner_epochs * 3 * (2 * backbone + head)


def measure(work: Work, dtype: str, threads: int, *, repeats: int = 7) -> GemmRate:
    """Median rate of each product with a minibatch's tokens as rows."""
    import torch

    torch.set_num_threads(threads)
    rows = work.minibatch_size * work.longest_tokens
    seconds, flops = {}, {}
    for linear in linears(work):
        tokens = work.minibatch_size * work.response_tokens if linear.name == "head" else rows
        input_NK = torch.randn(tokens, linear.in_features, dtype=getattr(torch, dtype))
        weight_MK = torch.randn(linear.out_features, linear.in_features, dtype=input_NK.dtype)
        output_NM = torch.randn(tokens, linear.out_features, dtype=input_NK.dtype)
        products = {
            "forward": lambda x=input_NK, w=weight_MK: torch.nn.functional.linear(x, w),
            "input_gradient": lambda y=output_NM, w=weight_MK: y @ w,
            "weight_gradient": lambda x=input_NK, y=output_NM: y.T @ x,
        }
        for product, compute in products.items():
            name = f"{linear.name}/{product}"
            seconds[name] = median_seconds(compute, repeats) * linear.count
            flops[name] = tokens * linear.flops_per_token
    forward = [name for name in seconds if name.endswith("/forward")]
    return GemmRate(
        dtype=dtype,
        threads=threads,
        training=sum(flops.values()) / sum(seconds.values()) / 1e9,
        forward=sum(flops[name] for name in forward) / sum(seconds[name] for name in forward) / 1e9,
        by_product={name: flops[name] / seconds[name] / 1e9 for name in seconds},
    )


def measure_apart(work: Work, dtype: str, threads: int) -> GemmRate:
    """`measure` in a process of its own, so that the caller's threads and its torch play no part."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        options = ["--dtypes", dtype, "--threads", threads, "--vocab-size", work.vocab_size, "--out", out.name]
        command = [sys.executable, "-m", "benchmarks.gemm", *map(str, options)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return GemmRate(**json.loads(Path(out.name).read_text())[0])


def median_seconds(compute: Callable[[], object], repeats: int, *, calls: int = 4) -> float:
    """Median over `repeats` of the mean of `calls` in a row, after one round to warm up."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for _ in range(calls):
            compute()
        taken.append((time.perf_counter() - started) / calls)
    return median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--vocab-size", type=int, default=Work.vocab_size)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = Work(vocab_size=args.vocab_size)
    rates = [measure(work, dtype, n, repeats=args.repeats) for dtype in args.dtypes for n in args.threads]
    for rate in rates:
        speeds = f"training {rate.training:6.0f} GFLOP/s, forward {rate.forward:6.0f}"
        print(f"{rate.dtype:9} {rate.threads} thread(s): {speeds}")
    if args.out:
        args.out.write_text(json.dumps([asdict(rate) for rate in rates], indent=1))


if __name__ == "__main__":
    main()
