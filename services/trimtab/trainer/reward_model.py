"""Stage 2, the reward model: all pairs of each ranking from K forwards (InstructGPT, eq. 1).

Starts from the SFT policy with a fresh scalar head, publishes `reward` with the constants that give its
score mean 0 and deviation 1 on reference samples. What it reports about itself is in `reward_report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from trimtab.models.packing import pack, plan_batches
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.context import StageContext
from trimtab.trainer.data import (
    TokenizedRanking,
    load_demonstrations,
    load_prompts,
    load_rankings,
    tokenize_demonstrations,
    tokenize_prompts,
    tokenize_rankings,
)
from trimtab.trainer.forward import negative_log_sigmoid, prepare_for_training
from trimtab.trainer.metrics import MetricWriter
from trimtab.trainer.optimizer import MasterWeightOptimizer, learning_rate, masters_of
from trimtab.trainer.rankings import plan_ranking_batches, score_rankings, untied_pairs
from trimtab.trainer.reward_report import evaluate_rankings, write_report
from trimtab.trainer.run import RunFailedError
from trimtab.trainer.sft import load_policy, tell_what_was_cut
from trimtab.trainer.stages import RewardModelConfig
from trimtab_client import GeneratorClient, ModelVersion, Sampling


def run_reward_model(config: RewardModelConfig, context: StageContext) -> None:
    """Run the stage to its end; raises what stops it."""
    stage = config.stage
    context.run.doing("loading the model and the rankings")
    model = ScalarModel.from_policy(load_policy(stage.model, context), seed=stage.seed)
    masters = masters_of(model.model, stage.compute_dtype)
    limit = min(stage.max_length, model.max_length)
    train = read_rankings(config.data, model, limit)
    validation = read_rankings(config.validation_data, model, limit) if config.validation_data else None
    prepare_for_training(model.model, activation_checkpointing=stage.activation_checkpointing)
    optimizer = MasterWeightOptimizer(model.model, stage.optimizer, masters)
    context.use_threads()

    steps_per_epoch = -(-len(train) // config.batch_prompts)
    total_steps = config.epochs * steps_per_epoch
    context.run.plan(total_steps)
    order = np.random.default_rng(stage.seed)

    def publish(step: int, metrics: dict[str, float]) -> ModelVersion:
        lineage = {"stage": "reward_model", "data": config.data, "start": stage.model}
        return context.publish(model, "reward", step, lineage=lineage, metrics=metrics)

    with MetricWriter(context.run, context.folder) as writer:
        step, loss = 0, float("nan")
        for _ in range(config.epochs):
            permutation = order.permutation(len(train))
            for start in range(0, len(train), config.batch_prompts):
                rate = learning_rate(stage.optimizer, step, total_steps)
                batch = [train[i] for i in permutation[start : start + config.batch_prompts]]
                context.run.doing("training")
                loss, accuracy = accumulate_pair_loss(model, batch, stage.micro_batch_tokens, optimizer)
                norm = optimizer.step(rate)
                step += 1
                metrics = {"loss": loss, "pair_accuracy": accuracy, "grad_norm_policy": norm, "learning_rate": rate}
                if validation and step % config.evaluate_every_steps == 0 and step < total_steps:
                    context.run.doing("evaluating on held-out rankings")
                    report = evaluate_rankings(model, validation, stage.micro_batch_tokens)
                    metrics["validation_pair_accuracy"] = report.accuracy
                writer.write(step, total_steps, metrics)
                if not np.isfinite(loss):
                    raise RunFailedError(f"step {step}: the loss is {loss}; lower learning_rate or check the data")
                if step < total_steps:
                    context.run.between_steps(partial(publish, step, {"loss": loss}))
        final = {"loss": loss}
        context.run.doing("measuring the score's mean and deviation")
        scores_B = normalization_scores(config, model, train, stage.micro_batch_tokens)
        model.set_normalization(float(scores_B.mean()), max(float(scores_B.std()), 1e-6))
        if validation:
            context.run.doing("evaluating on held-out rankings")
            report = evaluate_rankings(model, validation, stage.micro_batch_tokens)
            write_report(report, context.folder)
            final |= {
                "validation_pair_accuracy": report.accuracy,
                "validation_pair_accuracy_low": report.accuracy_low,
                "validation_pair_accuracy_high": report.accuracy_high,
            }
            writer.write(step, total_steps, final)
        context.run.doing("publishing the reward model")
        publish(total_steps, final | {"score_mean": model.mean, "score_std": model.std})


def read_rankings(source: str, model: ScalarModel, max_length: int) -> list[TokenizedRanking]:
    """Rankings as token sequences that end with the model's end token; those with no untied pair are left out."""
    eos = model.eos_token_ids[0] if model.eos_token_ids else None
    rows = tokenize_rankings(load_rankings(source), model.tokenizer, max_length, eos_token_id=eos)
    tell_what_was_cut(source, rows, max_length)
    kept = [row for row in rows if len(np.unique(row.ranks_K)) > 1]
    if not kept:
        raise RunFailedError(f"{source}: no ranking with an untied pair fits into {max_length} tokens")
    return kept


def ranking_loss(scores_K: torch.Tensor, ranks_K: np.ndarray) -> tuple[torch.Tensor, float]:
    """−(1/#pairs) Σ_{w≻l} log σ(r_w − r_l) over untied pairs, and the share of them in the right order."""
    winners, losers = untied_pairs(ranks_K)
    margins_P = scores_K[torch.as_tensor(winners)] - scores_K[torch.as_tensor(losers)]
    return negative_log_sigmoid(margins_P).mean(), float((margins_P.detach() > 0).float().mean())


def accumulate_pair_loss(
    model: ScalarModel, batch: Sequence[TokenizedRanking], micro_batch_tokens: int, optimizer: MasterWeightOptimizer
) -> tuple[float, float]:
    """Gradients of the mean loss over the batch's prompts (weight 1 each); returns mean loss and pair accuracy."""
    total_loss = total_accuracy = 0.0
    for micro in plan_ranking_batches(batch, micro_batch_tokens):
        rankings = [batch[i] for i in micro]
        scores = score_rankings(model, rankings)
        results = [ranking_loss(s, r.ranks_K) for s, r in zip(scores, rankings, strict=True)]
        loss = torch.stack([result[0] for result in results]).sum() / len(batch)
        loss.backward()
        optimizer.accumulate()
        total_loss += float(loss.detach())
        total_accuracy += sum(result[1] for result in results) / len(batch)
    return total_loss, total_accuracy


@torch.no_grad()
def normalization_scores(
    config: RewardModelConfig, model: ScalarModel, train: Sequence[TokenizedRanking], micro_batch_tokens: int
) -> torch.Tensor:
    """Raw scores of the reference samples: the generator's answers, demonstrations, or the rankings' responses."""
    sequences: list[np.ndarray]
    if not config.normalization_data:
        sequences = [sequence.token_ids_T for ranking in train for sequence in ranking.sequences]
    elif config.generator_address:
        prompts = tokenize_prompts(load_prompts(config.normalization_data), model.tokenizer, model.max_length - 1)
        sampling = Sampling(max_tokens=config.normalization_max_tokens, seed=config.stage.seed)
        with GeneratorClient(config.generator_address) as generator:
            if generator.get_model().tokenizer_digest != model.tokenizer_digest:
                raise RunFailedError("generator_address: its tokenizer is not the reward model's")
            completions = list(generator.generate([p.tolist() for p in prompts], sampling=sampling))
        completions.sort(key=lambda completion: completion.prompt_index)
        sequences = [np.concatenate([c.prompt_token_ids, c.token_ids]) for c in completions]
    else:
        eos = model.eos_token_ids[0] if model.eos_token_ids else None
        rows = load_demonstrations(config.normalization_data)
        tokenized = tokenize_demonstrations(rows, model.tokenizer, model.max_length, eos_token_id=eos)
        sequences = [row.token_ids_T for row in tokenized]
    return score_sequences(model, sequences, micro_batch_tokens)


@torch.no_grad()
def score_sequences(model: ScalarModel, sequences: Sequence[np.ndarray], micro_batch_tokens: int) -> torch.Tensor:
    """Raw score of each sequence, [B], in order."""
    scores_B = torch.empty(len(sequences))
    plan = plan_batches([len(sequence) for sequence in sequences], micro_batch_tokens)
    for micro in plan:
        scores_B[micro] = model.last_token_scores(pack([sequences[i] for i in micro], model.device)).cpu()
    return scores_B
