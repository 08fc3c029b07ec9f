"""What a version costs on its way from the trainer to a generator: full, and as a delta after one PPO step.

A policy of 135M parameters (SmolLM2-135M's shape with random weights, or a folder of yours) takes optimizer steps on
the PPO loss: bfloat16 weights over float32 masters, AdamW as in the trainer, sampled tokens, random advantages. The
version before the last step and the one after it are published and brought to a reader that serves the earlier one:

    publish   saving excluded: digests, comparison, upload, pointer
    stage     everything that happens beside the serving, until the new tensors lie in host memory, verified
    pause     writing them into the live weights, the only part that stops generation

    python -m benchmarks.publish --out publish.json                     # learning rates 1e-6, 3e-6, 1e-5
    python -m benchmarks.publish --model runs/smollm2 --store s3://bucket/bench
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.machine import describe_machine
from trimtab.kernels.ppo_terms import PpoSettings
from trimtab.models.policy import Policy
from trimtab.trainer.forward import TokenBatch, hidden_ppo_loss, response_hidden, response_logprobs, slice_batch
from trimtab.trainer.optimizer import MasterWeightOptimizer, masters_of
from trimtab.trainer.stages import OptimizerConfig
from trimtab.weights.delta_publish import Deltas
from trimtab.weights.store import Store, open_store

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BITS = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}
Staged = Callable[[], None]


@dataclass(frozen=True)
class Cost:
    """One way at one learning rate; seconds are medians of the repeats."""

    learning_rate: float
    kind: str
    served_dtype: str
    bytes: int
    changed_share: float
    publish_s: float
    stage_s: float
    pause_ms: float


def main() -> None:
    """Measure, print a line a case, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: random weights, 135M")
    parser.add_argument("--store", help="a store of its own; default: a temporary folder")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-6, 3e-6, 1e-5])
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the last one is the delta")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30, help="of the random model")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trimtab-bench-publish-") as scratch:
        root = Path(scratch)
        model = arguments.model or random_model(root / "model", arguments.layers)
        rows = []
        for rate in arguments.learning_rates:
            before, after = two_versions(model, rate, arguments.steps, root / f"lr-{rate:g}")
            rows += measure(before, after, rate, arguments.store or str(root / "store"), root, arguments.repeats)
    for row in rows:
        print(
            f"lr {row.learning_rate:g} {row.kind:5} served in {row.served_dtype:8} {row.bytes / 1e6:8.2f} MB "
            f"changed {row.changed_share:7.3%} publish {row.publish_s:.2f} s stage {row.stage_s:.2f} s "
            f"pause {row.pause_ms:.1f} ms"
        )
    result = {"machine": asdict(describe_machine()), "threads": torch.get_num_threads()}
    if arguments.out:
        arguments.out.write_text(json.dumps(result | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


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
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    word_tokenizer(Work()).save_pretrained(folder)
    return folder


def two_versions(model: Path, learning_rate: float, steps: int, folder: Path) -> tuple[Path, Path]:
    """Folders of the policy before and after its last PPO step."""
    policy = Policy.load(str(model), dtype="bfloat16")
    policy.model.requires_grad_(True)
    optimizer = MasterWeightOptimizer(
        policy.model, OptimizerConfig(learning_rate=learning_rate), masters_of(policy.model, "bfloat16")
    )
    rng = np.random.default_rng(1)
    for step in range(steps):
        if step == steps - 1:
            policy.save(folder / "before")
        ppo_step(policy, optimizer, learning_rate, rng)
    policy.save(folder / "after")
    return folder / "before", folder / "after"


def ppo_step(policy: Policy, optimizer: MasterWeightOptimizer, learning_rate: float, rng: np.random.Generator) -> None:
    """One minibatch: 8 sequences of 32 + 32 tokens, advantages of mean 0 and deviation 1."""
    sequences = tuple(rng.integers(3, policy.vocab_size, 64, dtype=np.int32) for _ in range(8))
    part = slice_batch(TokenBatch(sequences, (32,) * 8), range(8), policy.device)
    with torch.no_grad():
        old = response_logprobs(policy, part)
    advantages = torch.from_numpy(rng.standard_normal(len(part.targets_R)).astype(np.float32))
    loss = hidden_ppo_loss(
        policy,
        response_hidden(policy, part),
        part,
        old.logprob_N,
        advantages,
        torch.ones_like(advantages),
        old.lse_N,
        settings=PpoSettings(),
        normalizer=float(len(advantages)),
    )
    loss.loss.backward()
    optimizer.accumulate()
    optimizer.step(learning_rate)


def measure(before: Path, after: Path, rate: float, url: str, root: Path, repeats: int) -> list[Cost]:
    """Full and delta, into live weights of bfloat16 and float32."""
    rows = []
    for kind in ("full", "delta"):
        publish_s, manifests = [], []
        for repeat in range(repeats):
            run = f"{kind}-{rate:g}-{repeat}"
            deltas = Deltas(max_share=1.0, cache_dir=root / "publisher") if kind == "delta" else None
            store = open_store(url)
            first = store.publish(before, run_id=run, name="policy", step=1, deltas=deltas)
            started = time.perf_counter()
            manifests.append((first, store.publish(after, run_id=run, name="policy", step=2, deltas=deltas)))
            publish_s.append(time.perf_counter() - started)
        for dtype in (torch.bfloat16, torch.float32):
            stage_s, pause_s, share = [], [], 1.0
            for first, second in manifests:
                live = {
                    name: tensor.to(dtype, copy=True)
                    for name, tensor in load_file(before / "model.safetensors").items()
                }
                started = time.perf_counter()
                if kind == "full":
                    staged, share = stage_full(store, second, live, root / "reader"), 1.0
                else:
                    staged, share = stage_delta(store, first.version, second, live)
                stage_s.append(time.perf_counter() - started)
                started = time.perf_counter()
                staged()
                pause_s.append(time.perf_counter() - started)
                expected = load_file(after / "model.safetensors")
                assert all(torch.equal(live[name], tensor.to(dtype)) for name, tensor in expected.items())
                shutil.rmtree(root / "reader", ignore_errors=True)
            rows.append(
                Cost(
                    rate,
                    kind,
                    str(dtype).removeprefix("torch."),
                    manifests[0][1].size_bytes,
                    share,
                    statistics.median(publish_s),
                    statistics.median(stage_s),
                    statistics.median(pause_s) * 1e3,
                )
            )
    return rows


def stage_full(store: Store, version, live: dict[str, torch.Tensor], cache: Path) -> Staged:
    """Fetch and verify the folder, read its tensors in the live dtype."""
    folder = store.fetch(version, cache)
    tensors = {n: t.to(live[n].dtype, copy=True) for n, t in load_file(folder / "model.safetensors").items()}

    def swap() -> None:
        for name, tensor in tensors.items():
            live[name].copy_(tensor)

    return swap


def stage_delta(store: Store, served, version, live: dict[str, torch.Tensor]) -> tuple[Staged, float]:
    """Read positions and values of what changed, in the live dtype; nothing else is touched."""
    patches = []
    with store.changes(served, version) as changes:
        assert changes is not None
        for patch in changes.patches():
            target = live[patch.slot.name]
            values = patch.values()
            numpy_bits, torch_bits = BITS[values.dtype.itemsize]
            new = torch.from_numpy(values.view(numpy_bits)).view(torch_bits).view(TORCH_DTYPES[patch.slot.dtype])
            patches.append((target.view(-1), torch.from_numpy(patch.positions()), new.to(target.dtype)))
        share = changes.changed_elements / sum(tensor.numel() for tensor in live.values())

    def swap() -> None:
        for target, positions, values in patches:
            target.index_copy_(0, positions, values)

    return swap, share


if __name__ == "__main__":
    main()
