"""Stage 3, PPO: prompts → completions → scores and reference log-probs → update → publish, step after step.

Strictly on-policy: each step's completions come from the version published after the step before.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.context import StageContext
from trimtab.trainer.data import load_prompts, tokenize_prompts
from trimtab.trainer.forward import prepare_for_training
from trimtab.trainer.metrics import MetricWriter
from trimtab.trainer.optimizer import MasterWeightOptimizer, learning_rate, masters_of
from trimtab.trainer.ppo.exact_kl import load_reference_head
from trimtab.trainer.ppo.experience import Episode, gather_experience
from trimtab.trainer.ppo.kl_controller import KLController
from trimtab.trainer.ppo.prompts import PromptSampler
from trimtab.trainer.ppo.rollout_metrics import rollout_metrics
from trimtab.trainer.ppo.rollouts import RolloutClients, RolloutClocks
from trimtab.trainer.ppo.update import PpoUpdate
from trimtab.trainer.run import RunFailedError
from trimtab.trainer.sft import load_policy, tell_what_was_cut
from trimtab.trainer.side_by_side import SideBySide
from trimtab.trainer.stages import OptimizerConfig, PpoConfig, StageConfig
from trimtab_client import ModelVersion

MAX_SKIPPED_IN_A_ROW = 3


def run_ppo(config: PpoConfig, context: StageContext) -> None:
    """Run the stage to its end; raises what stops it."""
    context.run.doing("loading the policy, the value model and the prompts")
    with closing(SideBySide(context.device, context.threads)) as side_by_side, asyncio.Runner() as runner:
        state = PpoState(config, context, side_by_side)
        context.run.plan(config.steps)
        clients = runner.run(_open(config, state.policy, context))
        try:
            if config.exact_kl and clients.reference_model is not None:
                context.run.doing("loading the reference's LM head")
                state.update.reference_head = load_reference_head(clients.reference_model, state.policy, context.store)
            with MetricWriter(context.run, context.folder) as writer:
                _steps(config, context, state, runner, clients, writer)
        finally:
            runner.run(clients.close())


class PpoState:
    """All that moves during a run: models, optimizers, β, samplers and the step; what a resume will need.

    Attributes:
        policy_rate, value_rate: schedules by step.
    """

    def __init__(self, config: PpoConfig, context: StageContext, side_by_side: SideBySide) -> None:
        stage = config.stage
        self.step = 0
        self.skipped_in_a_row = 0
        self.policy = load_policy(stage.model, context)
        self.value_model = load_value_model(config, self.policy, context) if config.advantage == "gae" else None
        policy_optimizer = _optimizer(self.policy, stage, stage.optimizer)
        value_optimizer = self.value_model and _optimizer(self.value_model, stage, config.value_optimizer)
        self.kl = KLController(config.kl_coefficient, config.adaptive_kl_target, config.adaptive_kl_horizon)
        self.prompts = PromptSampler(read_prompts(config, self.policy), config.stage.seed)
        permutations = np.random.default_rng([config.stage.seed, 1])
        self.update = PpoUpdate(
            config, self.policy, policy_optimizer, self.value_model, value_optimizer, permutations, side_by_side
        )


def _optimizer(model: Policy | ScalarModel, stage: StageConfig, config: OptimizerConfig) -> MasterWeightOptimizer:
    masters = masters_of(model.model, stage.compute_dtype)
    prepare_for_training(model.model, activation_checkpointing=stage.activation_checkpointing)
    return MasterWeightOptimizer(model.model, config, masters)


def load_value_model(config: PpoConfig, policy: Policy, context: StageContext) -> ScalarModel:
    """The reward model with its normalisation folded into the head, or a fresh head on the policy.

    Raises:
        RunFailedError: the reward model has another tokenizer than the policy.
    """
    if not config.value_model:
        return ScalarModel.from_policy(policy, seed=config.stage.seed)
    source = context.resolve(config.value_model)
    value_model = ScalarModel.load(source.path_or_id, dtype="float32", device=context.device)
    if value_model.tokenizer_digest != policy.tokenizer_digest:
        raise RunFailedError(
            'value_model: its tokenizer is not the policy\'s; leave it empty ("") for a fresh head with warm-up steps'
        )
    value_model.fold_normalization()
    return value_model


def read_prompts(config: PpoConfig, policy: Policy) -> Sequence[np.ndarray]:
    """The prompt set as ids; prompts that leave no room for max_new_tokens are dropped."""
    limit = min(config.stage.max_length, policy.max_length) - config.max_new_tokens
    if limit < 1:
        raise RunFailedError(f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in {limit} tokens")
    prompts = tokenize_prompts(load_prompts(config.prompts), policy.tokenizer, limit)
    tell_what_was_cut(config.prompts, prompts, limit)
    if not len(prompts):
        raise RunFailedError(f"{config.prompts}: no prompt fits into {limit} tokens")
    return list(prompts)


async def _open(config: PpoConfig, policy: Policy, context: StageContext) -> RolloutClients:
    clients = RolloutClients(config, policy.tokenizer)
    context.run.doing(
        f"waiting for generator {config.generator_address}, reward {config.reward_address}, "
        f"reference {config.reference_address}"
    )
    await clients.check(policy.tokenizer_digest)
    return clients


def _steps(
    config: PpoConfig,
    context: StageContext,
    state: PpoState,
    runner: asyncio.Runner,
    clients: RolloutClients,
    writer: MetricWriter,
) -> None:
    version = _publish(config, context, state, {})
    runner.run(clients.load_version(version))
    while state.step < config.steps:
        started = time.perf_counter()
        context.run.doing("generating, scoring and referencing")
        prompts = state.prompts.draw(config.batch_size // config.samples_per_prompt)
        episodes, clocks = runner.run(clients.collect(prompts, state.step + 1, version))
        collected = time.perf_counter()

        context.run.doing("training")
        context.use_threads()
        experience = gather_experience(episodes)
        epoch = state.update.plan_epoch(experience)
        targets = state.update.fix_targets(experience, epoch, state.kl.coefficient)
        valued = time.perf_counter()
        rates = [learning_rate(c, state.step, config.steps) for c in (config.stage.optimizer, config.value_optimizer)]
        warming_up = state.step < config.value_warmup_steps
        metrics = rollout_metrics(experience, targets) | state.update.optimize(
            experience, epoch, targets, rates[0], rates[1], move_policy=not warming_up
        )
        metrics |= {"beta": state.kl.coefficient, "learning_rate": rates[0], "staleness_mean": 0.0}
        state.kl.update(metrics["kl_nats_per_sequence"], config.batch_size)
        trained = time.perf_counter()

        context.run.doing("publishing")
        state.step += 1
        _count_skips(state, metrics, episodes)
        version = _publish(config, context, state, metrics)
        runner.run(clients.load_version(version))
        published = time.perf_counter()
        metrics |= _times(clocks, experience.lengths_B, started, collected, valued, trained, published)
        _keep_samples(context.folder, state.step, episodes)
        writer.write(state.step, config.steps, metrics)
        if state.step < config.steps:
            context.run.between_steps(lambda newest=version: newest)


def _publish(config: PpoConfig, context: StageContext, state: PpoState, metrics: dict[str, float]) -> ModelVersion:
    lineage = {
        "stage": "ppo",
        "prompts": config.prompts,
        "start": config.stage.model,
        "value_start": config.value_model,
    }
    return context.publish(state.policy, "policy", state.step, lineage=lineage, metrics=metrics)


def _count_skips(state: PpoState, metrics: dict[str, float], episodes: Sequence[Episode]) -> None:
    """Stop after three steps in a row in which a non-finite loss or gradient kept the weights from moving."""
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if metrics["skipped_steps"] else 0
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        seeds = ", ".join(str(episode.completion.seed) for episode in episodes[:4])
        raise RunFailedError(
            f"non-finite loss or gradient in {MAX_SKIPPED_IN_A_ROW} steps in a row; lower the learning rate "
            f"(the newest samples have seeds {seeds}, …)"
        )


def _times(
    clocks: RolloutClocks,
    lengths_B: torch.Tensor,
    started: float,
    collected: float,
    valued: float,
    trained: float,
    published: float,
) -> dict[str, float]:
    """Seconds, tokens a second and the share of the step it was waited for, by stage."""
    total = published - started
    seconds = {
        "generate": clocks.generate.busy_s,
        "score": clocks.score.busy_s,
        "reference": clocks.reference.busy_s,
        "values": valued - collected,
        "train": trained - valued,
        "publish": published - trained,
    }
    waits = seconds | {"score": clocks.score.waited_s, "reference": clocks.reference.waited_s}
    tokens = float(lengths_B.sum())
    return (
        {"seconds_step": total}
        | {f"seconds_{name}": value for name, value in seconds.items()}
        | {f"tokens_per_second_{name}": tokens / max(value, 1e-9) for name, value in seconds.items()}
        | {f"wait_share_{name}": value / total for name, value in waits.items()}
    )


def _keep_samples(folder: Path, step: int, episodes: Sequence[Episode], count: int = 8) -> None:
    """Append the step's first samples to samples.jsonl in the run's folder, for the sample browser and the report."""
    with (folder / "samples.jsonl").open("a") as lines:
        for episode in episodes[:count]:
            completion = episode.completion
            row = {"step": step, "text": completion.text, "score": episode.normalized_score, "seed": completion.seed}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
