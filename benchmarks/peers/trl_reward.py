"""Reward-model training with TRL's RewardTrainer (trl 1.12.0) on the comparisons of reward_work.py, timed step by step.

It runs in TRL's own environment and imports nothing of trimtab or of the other benchmarks. TRL is used as it is: a
ranking of K is its K·(K−1)/2 pairs of two sequences each, in the file's order, 32 pairs a forward. bfloat16 is TRL's
`bf16=True`: autocast over float32 weights. Gradient checkpointing, on by default there, is off.
"""
# pyright: reportMissingImports=false
# (trl and datasets are packages of the peer's own environment)

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from itertools import combinations, pairwise
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True, help="one-label model folder with its tokenizer")
    parser.add_argument("--comparisons", type=Path, required=True, help='rows {"sequences": lists of ids, best first}')
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs-per-step", type=int, default=288)
    parser.add_argument("--pairs-per-forward", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(args.threads)
    sets = [json.loads(row)["sequences"] for row in args.comparisons.read_text().splitlines()]
    pairs = [pair for sequences in sets for pair in combinations(sequences, 2)][: args.steps * args.pairs_per_step]
    chosen, rejected = (list(side) for side in zip(*pairs, strict=True))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

        def on_train_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output_dir:
        config = RewardConfig(
            output_dir=output_dir,
            per_device_train_batch_size=args.pairs_per_forward,
            gradient_accumulation_steps=args.pairs_per_step // args.pairs_per_forward,
            max_steps=args.steps,
            train_sampling_strategy="sequential",
            learning_rate=9e-6,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=args.dtype == "bfloat16",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        trainer = RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(args.model_dir, dtype=torch.float32),
            args=config,
            processing_class=AutoTokenizer.from_pretrained(args.model_dir),
            train_dataset=Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}),
            callbacks=[Clock()],
        )
        started, cpu_before = time.perf_counter(), time.process_time()
        trainer.train()
        cores_used = (time.process_time() - cpu_before) / (time.perf_counter() - started)
    result = {
        "side": f"TRL {trl.__version__} RewardTrainer",
        "step_seconds": [after - before for before, after in pairwise(ends)],
        "first_loss": trainer.state.log_history[0]["loss"],
        "cores_used": cores_used,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
