"""Our side of the reward-training benchmark, a process of its own: the trainer's own steps, timed one by one.

Loss, gradients and optimizer are those of the reward-model stage, in the environment that the launcher gives services;
reading rows and publishing, which are outside the steps, are left out, as on the peer's side. `--forward separate`
computes the prompt anew for each response, as models that cannot share it do.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from itertools import pairwise
from pathlib import Path

FORWARDS = ("shared", "separate")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True, help="one-label model folder with its tokenizer")
    parser.add_argument("--comparisons", type=Path, required=True, help="rows as reward_work.py writes them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sets-per-step", type=int, default=8)
    parser.add_argument("--forward", choices=FORWARDS, default="shared")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    import numpy as np
    import torch

    from trimtab.models.scalar_head import ScalarModel
    from trimtab.trainer.data import TokenizedRanking, TokenSequence
    from trimtab.trainer.forward import prepare_for_training
    from trimtab.trainer.optimizer import MasterWeightOptimizer, masters_of
    from trimtab.trainer.reward_loss import accumulate_pair_loss
    from trimtab.trainer.side_by_side import SideBySide
    from trimtab.trainer.stages import OptimizerConfig, StageConfig

    torch.set_num_threads(args.threads)
    rankings = []
    for row in map(json.loads, args.comparisons.read_text().splitlines()):
        ids = [np.array(sequence, dtype=np.int32) for sequence in row["sequences"]]
        sequences = tuple(TokenSequence(token_ids_T, row["prompt_length"]) for token_ids_T in ids)
        rankings.append(TokenizedRanking(sequences, np.arange(1, len(ids) + 1), "", ""))
    stage = StageConfig(model=str(args.model_dir), compute_dtype=args.dtype)
    model = ScalarModel.load(stage.model)
    if args.forward == "separate":
        model.shares_beginnings = False
    masters = masters_of(model.model, args.dtype)
    prepare_for_training(model.model, activation_checkpointing=False)
    optimizer = MasterWeightOptimizer(model.model, OptimizerConfig(learning_rate=9e-6), masters)
    side_by_side = SideBySide("cpu", args.threads)
    started, cpu_before = time.perf_counter(), time.process_time()
    ends, losses = [started], []
    for first in range(0, len(rankings), args.sets_per_step):
        batch = rankings[first : first + args.sets_per_step]
        losses.append(accumulate_pair_loss(model, batch, stage.micro_batch_tokens, optimizer, side_by_side).loss)
        optimizer.step(9e-6)
        ends.append(time.perf_counter())
    result = {
        "side": f"trimtab, {args.forward} prompt",
        "step_seconds": [after - before for before, after in pairwise(ends)],
        "first_loss": losses[0],
        "cores_used": (time.process_time() - cpu_before) / (ends[-1] - started),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    side_by_side.close()
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
