"""Stage 2, the reward model: all pairs of each ranking from K forwards (InstructGPT, eq. 1).

Starts from the SFT policy with a fresh scalar head, publishes `reward` with the constants that give its
score mean 0 and deviation 1 on reference samples. The loss is in `reward_loss`, what it reports about itself in
`reward_report`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch

from trimtab.models.packing import pack, plan_batches
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.context import StageContext
from trimtab.trainer.data import (
    TokenizedRanking,
    load_rankings,
    tokenize_rankings,
)
from trimtab.trainer.epochs import EpochOrder
from trimtab.trainer.normalization import normalization_sequences
from trimtab.trainer.optimizer import learning_rate
from trimtab.trainer.ranks import ALONE, Ranks
from trimtab.trainer.reward_loss import accumulate_pair_loss
from trimtab.trainer.reward_report import RewardReport, make_report, score_held_out
from trimtab.trainer.run import RunFailedError
from trimtab.trainer.sft import load_policy, make_optimizer, tell_what_was_cut
from trimtab.trainer.side_by_side import SideBySide
from trimtab.trainer.stages import RewardModelConfig
from trimtab.trainer.state import TrainingState, restore_trained, trained_tensors
from trimtab_client import ModelVersion


def run_reward_model(config: RewardModelConfig, context: StageContext) -> None:
    """Run the stage to its end; raises what stops it."""
    stage, ranks = config.stage, context.ranks
    context.run.doing("loading the model and the rankings")
    model, train, validation = ranks.in_turn(lambda: _load(config, context))
    optimizer = make_optimizer(model, stage, stage.optimizer, ranks)
    context.use_threads()

    order = EpochOrder(len(train), config.batch_prompts, config.epochs, stage.seed)
    done_steps, loss = 0, float("nan")
    saved = context.restore()
    if saved is not None:
        restore_trained(model.model, optimizer, saved.tensors["reward"])
        done_steps, loss = saved.step, saved.values["loss"]

    def publish(step: int, metrics: dict[str, float]) -> ModelVersion:
        lineage = {"stage": "reward_model", "data": config.data, "start": stage.model}
        return context.publish(model, "reward", step, lineage=lineage, metrics=metrics)

    def state(step: int, loss: float) -> TrainingState:
        return TrainingState(step, {"loss": loss}, {"reward": trained_tensors(model.model, optimizer)})

    with (
        context.open_metrics(order.total_steps, done_steps) as writer,
        closing(SideBySide.of_ranks(context.device, context.threads, ranks)) as side_by_side,
    ):
        step, metrics = done_steps, {}
        for done, indices in order.batches(done_steps):
            rate = learning_rate(stage.optimizer, done, order.total_steps)
            context.run.doing("training")
            batch = [train[i] for i in indices]
            result = accumulate_pair_loss(model, batch, stage.micro_batch_tokens, optimizer, side_by_side)
            norm, loss = optimizer.step(rate), result.loss
            step = done + 1
            metrics = {"loss": loss, "pair_accuracy": result.accuracy}
            metrics |= {"grad_norm_policy": norm, "learning_rate": rate}
            if validation and step % config.evaluate_every_steps == 0 and step < order.total_steps:
                context.run.doing("evaluating on held-out rankings")
                held_out = score_held_out(model, validation, stage.micro_batch_tokens, ranks)
                metrics["validation_pair_accuracy"] = make_report(held_out).accuracy.share
            if not np.isfinite(loss):
                writer.write(step, order.total_steps, metrics)
                raise RunFailedError(f"step {step}: the loss is {loss}; lower learning_rate or check the data")
            if step < order.total_steps:
                writer.write(step, order.total_steps, metrics)
                take, announce = partial(state, step, loss), partial(publish, step, {"loss": loss})
                context.between_steps(step, stage.checkpoint_every_steps, take, announce)
        final = {"loss": loss}
        sequences = ranks.told(lambda: normalization_sequences(config, model, train, context))
        context.run.doing("measuring the score's mean and deviation")
        scores_B = score_sequences(model, sequences, stage.micro_batch_tokens, ranks)
        model.set_normalization(float(scores_B.mean()), max(float(scores_B.std()), 1e-6))
        if validation:
            context.run.doing("evaluating on held-out rankings")
            held_out = score_held_out(model, validation, stage.micro_batch_tokens, ranks)
            from trimtab.trainer.reward_plots import write_report  # matplotlib takes a second

            report = make_report(held_out, train)
            if ranks.leads:
                write_report(report, held_out, context.folder, mean=model.mean, std=model.std)
            final |= accuracy_metrics(report)
        writer.write(step, order.total_steps, metrics | final)  # the last step's row, with what the whole run came to
        context.run.doing("publishing the reward model")
        publish(order.total_steps, final | {"score_mean": model.mean, "score_std": model.std})


def accuracy_metrics(report: RewardReport) -> dict[str, float]:
    """The report's accuracies by the names of docs/metrics.md."""
    named = {
        "validation_pair_accuracy": report.accuracy,
        "validation_pair_accuracy_training_labelers": report.training_labelers,
        "validation_pair_accuracy_held_out_labelers": report.held_out_labelers,
    }
    return {
        name + suffix: value
        for name, accuracy in named.items()
        if accuracy is not None
        for suffix, value in (("", accuracy.share), ("_low", accuracy.low), ("_high", accuracy.high))
    }


def read_rankings(source: str, model: ScalarModel, max_length: int) -> list[TokenizedRanking]:
    """Rankings as token sequences that end with the model's end token; those with no untied pair are left out."""
    eos = model.eos_token_ids[0] if model.eos_token_ids else None
    rows = tokenize_rankings(load_rankings(source), model.tokenizer, max_length, eos_token_id=eos)
    tell_what_was_cut(source, rows, max_length)
    kept = [row for row in rows if len(np.unique(row.ranks_K)) > 1]
    if not kept:
        raise RunFailedError(f"{source}: no ranking with an untied pair fits into {max_length} tokens")
    return kept


def _load(
    config: RewardModelConfig, context: StageContext
) -> tuple[ScalarModel, list[TokenizedRanking], list[TokenizedRanking] | None]:
    """The model, the rankings and the held-out ones."""
    stage = config.stage
    model = ScalarModel.from_policy(load_policy(stage.model, context), seed=stage.seed)
    _ = model.shares_beginnings  # asked of the whole model, before it is sharded
    limit = min(stage.max_length, model.max_length)
    train = read_rankings(config.data, model, limit)
    validation = read_rankings(config.validation_data, model, limit) if config.validation_data else None
    sequences = (sequence.token_ids_T for ranking in train for sequence in ranking.sequences)
    context.state.check_data("data", itertools.chain(sequences, (ranking.ranks_K for ranking in train)))
    return model, train, validation


@torch.no_grad()
def score_sequences(
    model: ScalarModel, sequences: Sequence[np.ndarray], micro_batch_tokens: int, ranks: Ranks = ALONE
) -> torch.Tensor:
    """Raw score of each sequence, [B], in order."""
    scores_B = torch.zeros(len(sequences))
    plan = ranks.plan([len(sequence) for sequence in sequences], micro_batch_tokens, plan_batches)
    for micro in plan:
        row = [sequences[i] for i in micro] or [np.zeros(1, dtype=np.int64)]
        scores_B[micro] = model.last_token_scores(pack(row, model.device)).float().cpu()[: len(micro)]
    ranks.join_parts(scores_B)
    return scores_B
