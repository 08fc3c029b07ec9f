"""The update of one PPO step: old log-probs and values, advantages, then inner epochs of minibatches.

The first epoch runs over the very packs that the old log-probs were computed with, so its first ratio is 1; with the
generator's log-probs it is 1 but for the gap between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from trimtab.kernels.api import SelectedLogprobs
from trimtab.kernels.ppo_terms import PpoSettings
from trimtab.models.packing import plan_batches
from trimtab.models.policy import LMHead, Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.models.sharded import whole_weights
from trimtab.trainer.forward import (
    Slice,
    hidden_logprobs,
    hidden_ppo_loss,
    response_hidden,
    response_values,
    slice_batch,
)
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.ppo.advantages import (
    generalized_advantages,
    group_advantages,
    group_relative_advantages,
    token_rewards,
    whiten,
)
from trimtab.trainer.ppo.exact_kl import StepKl
from trimtab.trainer.ppo.experience import Experience, episode_scores
from trimtab.trainer.ppo.loss import importance_weights, policy_statistics, value_terms
from trimtab.trainer.ppo.pretraining import Pretraining
from trimtab.trainer.side_by_side import SideBySide
from trimtab.trainer.stages import PpoConfig

T = TypeVar("T")
Minibatch = list[Slice]
Forward = tuple[torch.Tensor, ...]
LARGE_HEAD = 0.2
"""From this share of a policy's parameters on its LM head gets all threads while the value model waits."""


@dataclass(frozen=True)
class Targets:
    """What the update holds fixed, flat over response tokens [R].

    Attributes:
        old_R: log-probs by the policy as it is when the update starts (the proximal policy), or by the generator.
        old_lse_R: the log-sum-exp in them; None for the generator's.
        weights_R: truncated importance weights, old against behaviour.
        entropy_R: of the policy's distributions; for the generator's log-probs those negated, whose mean it is.
        exact_kl: None where KL is only sampled.
    """

    old_R: torch.Tensor
    old_lse_R: torch.Tensor | None
    old_values_R: torch.Tensor
    advantages_R: torch.Tensor
    returns_R: torch.Tensor
    weights_R: torch.Tensor
    entropy_R: torch.Tensor
    exact_kl: StepKl | None = None


class PpoUpdate:
    """Updates a policy and, with GAE, a value model: `plan_epoch`, then `fix_targets`, then `optimize`.

    Every rank has the whole experience and plans the same epochs; its minibatches hold its own share of each one.

    `side_by_side` runs the two models' work; by default one after the other. `reference_head` is what exact KL needs,
    `pretraining` what PPO-ptx does. `skipped_samples` are the batch indices of this rank's samples in the minibatches
    that the last `optimize` skipped.
    """

    def __init__(
        self,
        config: PpoConfig,
        policy: Policy,
        policy_optimizer: MasterWeightOptimizer,
        value_model: ScalarModel | None,
        value_optimizer: MasterWeightOptimizer | None,
        permutations: np.random.Generator,
        side_by_side: SideBySide | None = None,
        reference_head: LMHead | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.policy_optimizer = policy_optimizer
        self.ranks = policy_optimizer.ranks
        self.value_model = value_model
        self.value_optimizer = value_optimizer
        self.permutations = permutations
        self.side_by_side = side_by_side or SideBySide()
        self.reference_head = reference_head
        self.pretraining: Pretraining | None = None
        self.skipped_samples: list[int] = []
        self.large_head = policy.head.weight_VD.numel() >= LARGE_HEAD * policy.parameter_count

    def plan_epoch(self, experience: Experience) -> list[Minibatch]:
        """A fresh permutation cut into minibatches, each into packed micro-batches, of which these are this rank's."""
        order = self.permutations.permutation(len(experience.tokens)).tolist()
        size = self.config.minibatch_size
        return [self._minibatch(experience, order[start : start + size]) for start in range(0, len(order), size)]

    def fix_targets(self, experience: Experience, epoch: Sequence[Minibatch], beta: float) -> Targets:
        """Old log-probs, values, advantages and returns of the whole batch."""
        config = self.config
        parts = [part for minibatch in epoch for part in minibatch]
        dtype = torch.promote_types(self.policy.model.dtype, torch.float32)  # float64 only for float64 weights
        exact_kl = self.reference_head and StepKl(self.reference_head, experience, config.temperature)
        values_R = torch.zeros(len(experience.behaviour_R), dtype=dtype)
        if config.old_logprobs == "generator":
            old_R, lse_R = experience.behaviour_R.to(dtype), None
            entropy_R = -old_R
            halves = parts[::2], parts[1::2]
            self.side_by_side.run(*(partial(self._old_values, half, values_R) for half in halves))
            self.ranks.join_parts(values_R)
        else:
            (old_R, lse_R, entropy_R), _ = self.side_by_side.run(
                lambda: self._old_logprobs(parts, torch.zeros_like(values_R), exact_kl),
                lambda: self._old_values(parts, values_R, each=self._make_way),
            )
            self.ranks.join_parts(old_R, lse_R, entropy_R, values_R)
        if exact_kl is not None:
            self.ranks.join_parts(exact_kl.kl_R, exact_kl.gap_R)
            exact_kl.check()
        lengths_B = experience.lengths_B
        scores_B = episode_scores(experience, config.no_eos_score).to(dtype)
        rewards_R = token_rewards(scores_B, old_R, experience.reference_R, lengths_B, beta)
        if config.whiten_rewards:
            rewards_R = whiten(rewards_R, shift_mean=False)
        if config.advantage == "gae":
            advantages_R = generalized_advantages(rewards_R, values_R, lengths_B, config.gamma, config.gae_lambda)
        else:
            estimate = group_relative_advantages if config.advantage == "grpo" else group_advantages
            advantages_R = estimate(rewards_R, lengths_B, config.samples_per_prompt)
        return Targets(
            old_R=old_R,
            old_lse_R=lse_R,
            old_values_R=values_R,
            advantages_R=advantages_R if config.advantage == "grpo" else whiten(advantages_R),  # GRPO has its own scale
            returns_R=advantages_R + values_R,
            weights_R=importance_weights(old_R, experience.behaviour_R, config.importance_weight_cap),
            entropy_R=entropy_R,
            exact_kl=exact_kl,
        )

    def optimize(
        self,
        experience: Experience,
        first_epoch: list[Minibatch],
        targets: Targets,
        policy_rate: float,
        value_rate: float,
        *,
        move_policy: bool = True,
    ) -> dict[str, float]:
        """Inner epochs of minibatch steps, the first over `first_epoch`; returns the metrics.

        `move_policy` is off while the value model warms up.
        """
        totals: dict[str, float] = {}
        ratio_max, steps, first_kl = 0.0, 0, None
        skipped: list[Minibatch] = []
        policy_norms: list[float] = []
        value_norms: list[float] = []
        for number in range(self.config.inner_epochs):
            epoch = first_epoch if number == 0 else self.plan_epoch(experience)
            epoch_kl = 0.0
            for minibatch in epoch:
                sums = self._minibatch_gradients(minibatch, targets, move_policy=move_policy)
                first_kl = sums["approx_kl"] / sums["tokens"] if first_kl is None else first_kl
                policy_norm, value_norm = self._step(sums, policy_rate if move_policy else None, value_rate)
                policy_norms.append(policy_norm)
                value_norms.append(value_norm)
                if not (math.isfinite(policy_norm) and math.isfinite(value_norm)):
                    skipped.append(minibatch)
                steps += 1
                ratio_max = max(ratio_max, sums.pop("ratio_max"))
                epoch_kl += sums["approx_kl"] / sums["tokens"] / len(epoch)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + value
            if self.config.target_approx_kl is not None and epoch_kl > self.config.target_approx_kl:
                break
        self.skipped_samples = _samples_of(skipped, experience)
        tokens = totals.pop("tokens")
        metrics = {name: value / tokens for name, value in totals.items()}
        return {
            "loss_policy": metrics["loss_policy"],
            "loss_value": metrics["loss_value"],
            "ratio_mean": metrics["ratio"],
            "ratio_max": ratio_max,
            "approx_kl": metrics["approx_kl"],
            "approx_kl_first_minibatch": float(first_kl or 0.0),
            "clip_fraction_policy": metrics["clipped_policy"],
            "clip_fraction_value": metrics["clipped_value"],
            "grad_norm_policy": _finite_mean(policy_norms),
            "grad_norm_value": _finite_mean(value_norms),
            "optimizer_steps": float(steps - len(skipped)),
            "skipped_steps": float(len(skipped)),
        } | {name: metrics[name] for name in ("loss_kl", "loss_ptx") if name in metrics}

    def _with_all_threads(self, head: Callable[[], T]) -> T:
        """The policy's head over the part at hand; meets the value model's `_make_way` where it is large."""
        return self.side_by_side.alone(head) if self.large_head else head()

    def _make_way(self) -> None:
        if self.large_head:
            self.side_by_side.make_way()

    def _minibatch(self, experience: Experience, indices: list[int]) -> Minibatch:
        lengths = [len(experience.tokens.sequences[i]) for i in indices]
        plan = self.ranks.plan(lengths, self.config.stage.micro_batch_tokens, plan_batches)
        return [slice_batch(experience.tokens, [indices[i] for i in part], self.policy.device) for part in plan]

    @torch.no_grad()
    def _old_logprobs(
        self, parts: Sequence[Slice], out_R: torch.Tensor, exact_kl: StepKl | None
    ) -> tuple[torch.Tensor, ...]:
        """Log-probs, written into `out_R`, log-sum-exps and entropies; has `exact_kl` measured on the way."""
        lse_R, entropy_R = torch.zeros_like(out_R), torch.zeros_like(out_R)

        def head(part: Slice, hidden_RD: torch.Tensor) -> SelectedLogprobs:
            if exact_kl is not None:
                exact_kl.measure(self.policy, hidden_RD, part)
            return hidden_logprobs(self.policy, hidden_RD, part, self.config.temperature)

        def selected(part: Slice) -> SelectedLogprobs:
            hidden_RD = response_hidden(self.policy, part)
            return self._with_all_threads(partial(head, part, hidden_RD))

        for part in parts:
            columns = whole_weights(self.policy.model, partial(selected, part))
            where = part.flat_R.cpu()
            for all_R, part_R in zip((out_R, lse_R, entropy_R), columns, strict=True):
                all_R[where] = part_R.cpu()
        return out_R, lse_R, entropy_R

    @torch.no_grad()
    def _old_values(self, parts: Sequence[Slice], out_R: torch.Tensor, each: Callable[[], None] = lambda: None) -> None:
        """Write values into `out_R`, calling `each` after each part; it stays as it is without a value model."""
        if self.value_model is not None:
            for part in parts:
                out_R[part.flat_R.cpu()] = response_values(self.value_model, part).cpu()
                each()

    def _minibatch_gradients(self, minibatch: Minibatch, targets: Targets, *, move_policy: bool) -> dict[str, float]:
        """Gradients of the minibatch's mean losses over its response tokens; returns the sums of their terms."""
        tokens = int(self.ranks.total(sum(len(part.targets_R) for part in minibatch)))
        policy_sums, value_sums = self.side_by_side.run(
            lambda: self._policy_gradients(minibatch, targets, tokens, move_policy=move_policy),
            lambda: self._value_gradients(minibatch, targets, tokens),
        )
        ratio_max = self.ranks.largest(policy_sums.pop("ratio_max"))
        return self.ranks.add(policy_sums | value_sums) | {"ratio_max": ratio_max, "tokens": float(tokens)}

    def _policy_gradients(
        self, minibatch: Minibatch, targets: Targets, tokens: int, *, move_policy: bool
    ) -> dict[str, float]:
        config = self.config
        names = ("loss_policy", "ratio", "approx_kl", "clipped_policy", "ratio_max")
        penalty = targets.exact_kl if config.kl == "exact_loss" else None
        sums: dict[str, float] = dict.fromkeys(names if penalty is None else (*names, "loss_kl"), 0.0)
        settings = PpoSettings(
            clip_low=config.clip_range, clip_high=config.clip_range, entropy_coefficient=config.entropy_coefficient
        )
        for part in minibatch:
            old_R, advantages_R, weights_R = part.take(targets.old_R, targets.advantages_R, targets.weights_R)
            lse_R = None if targets.old_lse_R is None else part.take(targets.old_lse_R)[0]

            def head(hidden_RD: torch.Tensor, part=part, fixed=(old_R, advantages_R, weights_R, lse_R)) -> Forward:
                loss, logprobs_R, _ = hidden_ppo_loss(
                    self.policy,
                    hidden_RD,
                    part,
                    *fixed,
                    settings=settings,
                    normalizer=tokens,
                    temperature=config.temperature,
                )
                kl_nats = loss.new_zeros(()) if penalty is None else penalty.total(self.policy, hidden_RD, part)
                return loss, logprobs_R, kl_nats

            def forward(part=part, head=head) -> Forward:
                hidden_RD = response_hidden(self.policy, part)
                return self._with_all_threads(partial(head, hidden_RD))

            with torch.set_grad_enabled(move_policy):
                loss, logprobs_R, kl_nats = whole_weights(self.policy.model, forward)
                if penalty is not None:
                    loss = loss + config.kl_loss_coefficient / tokens * kl_nats
                    sums["loss_kl"] += float(kl_nats.detach())
            if move_policy:
                loss.backward()
                self.policy_optimizer.accumulate()
            sums["loss_policy"] += float(loss.detach()) * tokens
            if len(logprobs_R):
                statistics = policy_statistics(logprobs_R, old_R, advantages_R, config.clip_range)
                sums["ratio_max"] = max(sums["ratio_max"], statistics.pop("ratio_max"))
                for name, value in statistics.items():
                    sums[name] += value
        if self.pretraining is not None and move_policy:
            sums["loss_ptx"] = self.pretraining.accumulate(self.policy, self.policy_optimizer) * tokens
        return sums

    def _value_gradients(self, minibatch: Minibatch, targets: Targets, tokens: int) -> dict[str, float]:
        config = self.config
        sums = {"loss_value": 0.0, "clipped_value": 0.0}
        if self.value_model is None or self.value_optimizer is None:
            return sums
        for part in minibatch:
            values_R = response_values(self.value_model, part)
            fixed = part.take(targets.old_values_R, targets.returns_R)
            loss, statistics = value_terms(values_R, *fixed, clip_range=config.value_clip_range)
            self._make_way()
            (config.value_coefficient * loss / tokens).backward()
            self.value_optimizer.accumulate()
            sums["loss_value"] += float(loss.detach())
            sums["clipped_value"] += statistics["clipped_value"]
        return sums

    def _step(self, sums: dict[str, float], policy_rate: float | None, value_rate: float) -> tuple[float, float]:
        """Step both optimizers; a non-finite loss steps neither, a non-finite gradient not its own.

        Returns both gradient norms: 0 for a model that does not train, NaN after a non-finite loss.
        """
        policy, value = self.policy_optimizer, self.value_optimizer
        if not (math.isfinite(sums["loss_policy"]) and math.isfinite(sums["loss_value"])):
            policy.clear()
            if value is not None:
                value.clear()
            return math.nan, math.nan
        return self.side_by_side.run(
            lambda: 0.0 if policy_rate is None else policy.step(policy_rate),
            lambda: 0.0 if value is None else value.step(value_rate),
        )


def _samples_of(minibatches: Sequence[Minibatch], experience: Experience) -> list[int]:
    """Whose tokens these minibatches hold, by index in the batch."""
    ends_B = experience.lengths_B.cumsum(0)
    found = [torch.searchsorted(ends_B, part.flat_R.cpu(), right=True) for batch in minibatches for part in batch]
    return torch.cat(found).unique().tolist() if found else []


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else 0.0
