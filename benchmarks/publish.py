"""What a version costs on its way from the trainer to a generator: full, and as a delta after one PPO step.

A policy of 135M parameters (SmolLM2-135M-Instruct, by examples/smollm2, or that shape with random weights) is trained
for some PPO steps as ppo_versions.py says. The version before the last step and the one after it are published, and
brought to a generator's engine that serves the earlier one:

    publish   digests, comparison, upload, pointer; the saving of the folder before it is left out
    stage     everything that happens beside sampling: fetch, verify, read into host memory
    pause     the longest of the engine's steps that make ready and swap: sampling waits

    cd examples/smollm2 && python prepare.py; cd ../..
    python -m benchmarks.publish --model examples/smollm2/prepared/model \\
        --prompts examples/smollm2/prepared/ppo/train.jsonl --out publish.json --plot publish.png
    python -m benchmarks.publish --layers 2 --learning-rates 1e-6       # random weights, a minute
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.machine import BusyMeter, describe_machine
from benchmarks.ppo_versions import Plan, engine_of, generating_policy, two_versions
from trimtab.generator.engine import StagedPatches, SwapMode
from trimtab.generator.loading import stage_weights
from trimtab.weights.delta_publish import Deltas
from trimtab.weights.manifest import Manifest
from trimtab.weights.store import Store, open_store


@dataclass(frozen=True)
class Cost:
    """One way at one learning rate into a generator of one dtype; seconds are medians of the repeats."""

    learning_rate: float
    kind: str
    served_dtype: str
    bytes: int
    share_of_full: float
    changed_share: float
    publish_s: float
    stage_s: float
    pause_ms: float
    worst_pause_ms: float


def main() -> None:
    """Measure, print a line a case, write JSON and a plot where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: random weights")
    parser.add_argument("--prompts", type=Path, help="JSONL of prompts or messages; default: random tokens")
    parser.add_argument("--trained", type=Path, help="keeps RATE/before and RATE/after here; takes what is there")
    parser.add_argument("--train-only", action="store_true", help="measure nothing: the machine need not be quiet")
    parser.add_argument("--store", help="a store of its own; default: a temporary folder")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-6, 3e-6, 1e-5])
    parser.add_argument("--steps", type=int, default=3, help="PPO steps; the last one is the delta")
    parser.add_argument("--minibatches", type=int, default=8, help="optimizer steps a PPO step")
    parser.add_argument("--minibatch", type=int, default=4, help="answers in each")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30, help="of the random model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    rows: list[Cost] = []
    meter = BusyMeter()
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-publish-") as scratch:
        root = Path(scratch)
        trained = chosen.trained or root / "trained"
        for rate in chosen.learning_rates:
            folder = trained / f"{rate:g}"
            if not (folder / "after").exists():
                model = chosen.model or random_model(root / "model", chosen.layers)
                plan = Plan(rate, chosen.steps, chosen.minibatches, chosen.minibatch, chosen.tokens)
                two_versions(model, chosen.prompts, plan, folder)
            if chosen.train_only:
                continue
            store = open_store(chosen.store or str(root / "store"))
            for row in measure(folder / "before", folder / "after", rate, store, root / "publisher", chosen.repeats):
                print(describe(row), flush=True)
                rows.append(row)
            shutil.rmtree(root / "store", ignore_errors=True)
            if chosen.out:
                result = {
                    "machine": asdict(describe_machine()),
                    "threads": torch.get_num_threads(),
                    "busy_cores": round(meter.cores(), 2),
                    "optimizer_steps": chosen.minibatches,
                    "rows": [asdict(row) for row in rows],
                }
                chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    if chosen.plot and rows:
        draw(rows, chosen.plot)


def describe(row: Cost) -> str:
    """One line of the table."""
    return (
        f"lr {row.learning_rate:g} {row.kind:5} served in {row.served_dtype:8} {row.bytes / 1e6:8.2f} MB "
        f"{row.share_of_full:6.2%} changed {row.changed_share:7.3%} publish {row.publish_s:.2f} s "
        f"stage {row.stage_s:.2f} s pause {row.pause_ms:.1f} ms (worst {row.worst_pause_ms:.1f})"
    )


def random_model(folder: Path, layers: int) -> Path:
    """SmolLM2-135M's shape; the weights are what a fresh model has (normal, 0.02)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.models import Work, word_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    word_tokenizer(Work()).save_pretrained(folder)
    return folder


def measure(before: Path, after: Path, rate: float, store: Store, cache: Path, repeats: int) -> list[Cost]:
    """Full and delta, into generators of bfloat16 and float32."""
    rows = []
    full_bytes = (after / "model.safetensors").stat().st_size
    changed_share = share_changed(before, after)
    for kind in ("full", "delta"):
        deltas = Deltas(max_share=1.0, cache_dir=cache) if kind == "delta" else None
        publish_s, published = [], []
        for repeat in range(repeats):
            run = f"{kind}-{rate:g}-{repeat}-{time.time_ns()}"
            first = store.publish(before, run_id=run, name="policy", step=1, deltas=deltas)
            started = time.perf_counter()
            second = store.publish(after, run_id=run, name="policy", step=2, deltas=deltas)
            publish_s.append(time.perf_counter() - started)
            published.append((first, second))
        size = published[0][1].size_bytes if kind == "delta" else full_bytes
        for dtype in ("bfloat16", "float32"):
            costs = [swap_costs(store, first, second, before, after, dtype) for first, second in published]
            stage_s, pause_s = zip(*costs, strict=True)
            rows.append(
                Cost(
                    rate,
                    kind,
                    dtype,
                    size,
                    size / full_bytes,
                    changed_share,
                    statistics.median(publish_s),
                    statistics.median(stage_s),
                    statistics.median(pause_s) * 1e3,
                    max(pause_s) * 1e3,
                )
            )
    return rows


def share_changed(before: Path, after: Path) -> float:
    """Share of all elements whose bits differ."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    changed = sum(int((new[name].view(torch.int16) != tensor.view(torch.int16)).sum()) for name, tensor in old.items())
    return changed / sum(tensor.numel() for tensor in old.values())


def swap_costs(
    store: Store, first: Manifest, second: Manifest, before: Path, after: Path, dtype: str
) -> tuple[float, float]:
    """Seconds of staging and of the longest step until it serves; the weights must come out as published."""
    policy = generating_policy(before, dtype)
    engine = engine_of(policy, first.version)
    started = time.perf_counter()
    staged = stage_weights(store, second.version, policy, first.version)
    stage_s = time.perf_counter() - started
    assert isinstance(staged, StagedPatches) == (second.kind == "delta")
    done = engine.swap(staged, SwapMode.KEEP)
    pause_s = 0.0
    while not done.done():
        started = time.perf_counter()
        engine.step()
        pause_s = max(pause_s, time.perf_counter() - started)
    assert done.result(timeout=0) == second.version
    live = policy.model.state_dict()
    for name, tensor in load_file(after / "model.safetensors").items():
        assert torch.equal(live[name], tensor.to(live[name].dtype)), name
    return stage_s, pause_s


def draw(rows: list[Cost], path: Path) -> None:
    """Share of the full bytes and pause by learning rate."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    deltas = [row for row in rows if row.kind == "delta" and row.served_dtype == "bfloat16"]
    rates = [row.learning_rate for row in deltas]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
    left.plot(rates, [100 * row.share_of_full for row in deltas], "o-", label="bytes of the delta, of full")
    left.plot(rates, [100 * row.changed_share for row in deltas], "s--", label="elements changed")
    left.axhline(5, color="grey", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlabel="learning rate", ylabel="%", ylim=(0, None))
    left.legend(frameon=False)
    for kind in ("full", "delta"):
        for dtype, line in (("bfloat16", "o-"), ("float32", "s--")):
            chosen = [row for row in rows if (row.kind, row.served_dtype) == (kind, dtype)]
            right.plot(rates, [row.pause_ms for row in chosen], line, label=f"{kind}, served in {dtype}")
    right.axhline(100, color="grey", linewidth=0.8, linestyle=":")
    right.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="pause, ms")
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
