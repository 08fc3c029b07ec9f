"""The PPO update: ratio 1 at the start, invariance to packing and micro-batches, hand-computed losses, resume state."""

import copy
import math
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from trimtab.kernels.ppo_terms import PpoSettings, RowTargets, row_losses
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.forward import response_logprobs, response_values, slice_batch
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.ppo.experience import Episode, episode_scores, gather_experience
from trimtab.trainer.ppo.loss import importance_weights, policy_statistics, value_terms
from trimtab.trainer.ppo.prompts import Sampler, completion_seed
from trimtab.trainer.ppo.rollout_metrics import rollout_metrics
from trimtab.trainer.ppo.update import PpoUpdate
from trimtab.trainer.side_by_side import SideBySide
from trimtab.trainer.stages import OptimizerConfig, PpoConfig, StageConfigError, parse_stage
from trimtab_client import Completion, ModelVersion, VersionRun

VERSION = ModelVersion("r", "policy", 0, "blake3:0")


def config(**changes) -> PpoConfig:
    values = {
        "stage": {"model": "m", "optimizer": {"learning_rate": 1e-3}},
        "prompts": "p",
        "batch_size": 8,
        "minibatch_size": 4,
    }
    return parse_stage("ppo", values | changes)  # type: ignore[return-value]


def experience_of(policy, seed=0, episodes=8):
    """Random completions whose behaviour log-probs are the policy's own."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(episodes):
        prompt = random.integers(3, 48, random.integers(1, 6)).astype(np.int32)
        response = random.integers(3, 48, random.integers(1, 12)).astype(np.int32)
        completion = Completion(
            prompt_index=index,
            sample_index=0,
            prompt_token_ids=prompt,
            token_ids=response,
            logprobs=np.zeros(len(response), dtype=np.float32),
            text="",
            finish_reason="stop" if index % 2 else "length",
            versions=(VersionRun(VERSION, len(response)),),
            seed=index,
        )
        reference = random.normal(-3.5, 0.3, len(response)).astype(np.float32)
        made.append(Episode(completion, float(index), float(random.normal()), reference))
    experience = gather_experience(made)
    part = slice_batch(experience.tokens, range(episodes))
    with torch.no_grad():
        experience.behaviour_R[part.flat_R] = response_logprobs(policy, part).logprob_N.float()
    return experience


def make_update(folder, dtype="float32", **changes):
    cfg = config(**changes)
    policy = Policy.load(str(folder), dtype=dtype)
    value = ScalarModel.from_policy(policy, seed=1)
    optimizers = [MasterWeightOptimizer(m.model, OptimizerConfig(learning_rate=1e-3)) for m in (policy, value)]
    return PpoUpdate(cfg, policy, optimizers[0], value, optimizers[1], np.random.default_rng(0))


def test_first_minibatch_has_ratio_one_and_no_kl(tiny_folder):
    update = make_update(tiny_folder)
    experience = experience_of(update.policy)
    epoch = update.plan_epoch(experience)
    targets = update.fix_targets(experience, epoch, 0.02)
    sums = update._minibatch_gradients(epoch[0], targets, move_policy=True)
    assert sums["ratio"] / sums["tokens"] == 1 and sums["ratio_max"] == 1
    assert sums["approx_kl"] == 0


@pytest.mark.parametrize("micro_batch_tokens", [12, 40, 10_000])
def test_first_gradients_do_not_depend_on_micro_batches_or_packing_order(tiny_folder, micro_batch_tokens):
    def gradients(tokens, reverse):
        update = make_update(tiny_folder, stage={"model": "m", "micro_batch_tokens": tokens})
        experience = experience_of(update.policy)
        first, *rest = update.plan_epoch(experience)
        targets = update.fix_targets(experience, [first, *rest], 0.02)
        update._minibatch_gradients(first[::-1] if reverse else first, targets, move_policy=True)
        models = (update.policy.model, update.value_model.model)
        return [p.grad for model in models for p in model.parameters() if p.grad is not None]

    ours, whole = gradients(micro_batch_tokens, True), gradients(100_000, False)
    assert len(ours) == len(whole) > 20
    for got, want in zip(ours, whole, strict=True):
        assert float((got - want).norm()) <= 1e-5 * float(want.norm()) + 1e-9


@pytest.mark.parametrize("large_head", [False, True])
def test_policy_and_value_model_side_by_side_learn_what_they_learn_one_after_the_other(tiny_folder, large_head):
    def train(side_by_side):
        update = make_update(tiny_folder, dtype="float64")
        update.large_head = large_head
        update.side_by_side = side_by_side
        experience = experience_of(update.policy)
        epoch = update.plan_epoch(experience)
        metrics = update.optimize(experience, epoch, update.fix_targets(experience, epoch, 0.02), 1e-3, 1e-3)
        models = (update.policy.model, update.value_model.model)
        return metrics, torch.cat([p.detach().flatten() for model in models for p in model.parameters()])

    with closing(SideBySide("cpu", threads=2)) as both:
        (ours, weights), (expected, expected_weights) = train(both), train(SideBySide())
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert float((weights - expected_weights).abs().max()) < 1e-9


@pytest.mark.parametrize("threads", [1, 2])
def test_the_generators_log_probs_teach_what_the_trainers_own_do_where_they_are_equal(tiny_folder, threads):
    def train(source, behaviour_R=None):
        update = make_update(tiny_folder, dtype="float64", old_logprobs=source, inner_epochs=2)
        update.side_by_side = both
        experience = experience_of(update.policy)
        if behaviour_R is not None:
            experience = replace(experience, behaviour_R=behaviour_R)
        epoch = update.plan_epoch(experience)
        targets = update.fix_targets(experience, epoch, 0.02)
        metrics = rollout_metrics(experience, targets) | update.optimize(experience, epoch, targets, 1e-3, 1e-3)
        models = (update.policy.model, update.value_model.model)
        return targets, metrics, torch.cat([p.detach().flatten() for model in models for p in model.parameters()])

    with closing(SideBySide("cpu", threads=threads)) as both:
        old_R = train("trainer")[0].old_R
        (_, expected, expected_weights), (targets, metrics, weights) = (
            train("trainer", old_R),
            train("generator", old_R),
        )
    assert float((weights - expected_weights).abs().max()) < 1e-12
    assert float(targets.old_values_R.abs().min()) > 0
    assert expected.keys() - metrics.keys() == {"logprob_gap_mean", "logprob_gap_max", "importance_weight_mean"}
    assert metrics.pop("entropy_mean") == pytest.approx(-float(old_R.mean()))
    assert metrics == pytest.approx({name: expected[name] for name in metrics}, abs=1e-12)


def test_what_the_generators_log_probs_are_off_by_is_in_the_ratio_and_in_no_weight(tiny_folder):
    update = make_update(tiny_folder, old_logprobs="generator")
    experience = experience_of(update.policy)
    experience = replace(experience, behaviour_R=experience.behaviour_R - 0.1)
    epoch = update.plan_epoch(experience)
    targets = update.fix_targets(experience, epoch, 0.02)
    sums = update._minibatch_gradients(epoch[0], targets, move_policy=True)
    assert sums["ratio"] / sums["tokens"] == pytest.approx(math.exp(0.1), abs=1e-5)
    assert bool((targets.weights_R == 1).all())


@pytest.mark.parametrize("kl", ["exact_metric", "exact_loss"])
def test_exact_kl_is_refused_with_the_generators_log_probs(kl):
    with pytest.raises(StageConfigError, match=r"old_logprobs.*leave it at 'trainer'"):
        config(kl=kl, old_logprobs="generator", kl_loss_coefficient=0.1 if kl == "exact_loss" else 0.0)


def test_a_policy_that_does_not_move_has_no_gradient_norm(tiny_folder):
    update = make_update(tiny_folder)
    experience = experience_of(update.policy)
    epoch = update.plan_epoch(experience)
    targets = update.fix_targets(experience, epoch, 0.02)
    metrics = update.optimize(experience, epoch, targets, 1e-3, 1e-3, move_policy=False)
    assert metrics["grad_norm_policy"] == 0 < metrics["grad_norm_value"]


def test_twenty_steps_in_float64_agree_across_micro_batch_sizes(tiny_folder):
    def train(tokens):
        update = make_update(tiny_folder, dtype="float64", stage={"model": "m", "micro_batch_tokens": tokens})
        experience = experience_of(update.policy)
        for _ in range(10):  # two minibatches each
            epoch = update.plan_epoch(experience)
            update.optimize(experience, epoch, update.fix_targets(experience, epoch, 0.02), 1e-3, 1e-3)
        return torch.cat([p.detach().flatten() for p in update.policy.model.parameters()])

    assert float((train(15) - train(100_000)).abs().max()) < 1e-9


def test_old_values_at_step_zero_equal_the_normalised_reward_model(tiny_folder, tmp_path):
    policy = Policy.load(str(tiny_folder))
    reward = ScalarModel.from_policy(policy, seed=3)
    reward.set_normalization(0.7, 2.5)
    reward.save(tmp_path / "reward")
    value = ScalarModel.load(str(tmp_path / "reward"))
    value.fold_normalization()
    experience = experience_of(policy)
    part = slice_batch(experience.tokens, range(8))
    with torch.no_grad():
        want = reward.normalized(reward.scores(part.packed))[part.positions_R]
        torch.testing.assert_close(response_values(value, part), want, rtol=1e-5, atol=1e-6)


def test_prompt_tokens_get_no_loss_reward_or_gradient(tiny_folder):
    policy = Policy.load(str(tiny_folder))
    experience = experience_of(policy)
    part = slice_batch(experience.tokens, [2])
    prompt, response = experience.tokens.prompt_lengths[2], int(experience.tokens.response_lengths[2])
    assert len(part.targets_R) == response
    assert part.positions_R.tolist() == list(range(prompt - 1, prompt + response - 1))


def test_policy_loss_by_hand():
    old = torch.zeros(4)
    logp = torch.tensor([1.5, 0.5, 1.0, 0.9]).log()
    advantages, weights = torch.tensor([1.0, 1.0, -2.0, -1.0]), torch.tensor([1.0, 2.0, 1.0, 1.0])
    losses, _ = row_losses(logp, RowTargets(old, advantages, weights, None), PpoSettings())
    statistics = policy_statistics(logp, old, advantages, 0.2)
    # clipped at 1.2; 0.5 not clipped (min), weight 2; -2·1; -1·0.9
    assert float(losses.sum()) == pytest.approx(-(1.2 + 2 * 0.5 - 2.0 - 0.9), rel=1e-6)
    assert statistics["clipped_policy"] == 1 and statistics["ratio_max"] == pytest.approx(1.5)


def test_value_loss_by_hand():
    loss, statistics = value_terms(torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0]), 0.2)
    # max((1-1)², (0.2-1)²) = 0.64; max(0.81, 0.81) = 0.81
    assert float(loss) == pytest.approx(0.5 * (0.64 + 0.81), rel=1e-6)
    assert statistics["clipped_value"] == 1


def test_rounding_is_not_counted_as_clipping():
    torch.manual_seed(0)
    old_R = 0.1 * torch.randn(1000).clamp(-0.9, 0.9)
    values_R = (0.1 * torch.randn(1000).clamp(-0.9, 0.9)).requires_grad_()  # v_old + (v − v_old) is often not v
    returns_R = torch.randn(1000)
    loss, statistics = value_terms(values_R, old_R, returns_R, 0.2)
    assert statistics["clipped_value"] == 0
    assert torch.equal(torch.autograd.grad(loss, values_R)[0], values_R.detach() - returns_R)


def test_importance_weights_are_truncated():
    weights = importance_weights(torch.tensor([0.0, 3.0, -1.0]), torch.zeros(3), 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, float(np.exp(-1))]))


def test_no_eos_score_replaces_the_score(tiny_folder):
    experience = experience_of(Policy.load(str(tiny_folder)))
    scores = episode_scores(experience, -1.0)
    for index, ended in enumerate(experience.ended_B):
        assert float(scores[index]) == (float(experience.normalized_B[index]) if ended else -1.0)
    assert torch.equal(episode_scores(experience, None), experience.normalized_B)


def test_a_non_finite_loss_moves_nothing_and_is_counted(tiny_folder):
    update = make_update(tiny_folder)
    experience = experience_of(update.policy)
    experience.reference_R[3] = float("nan")  # its advantages are whitened over the batch: nothing is finite
    before = copy.deepcopy(update.policy.model.state_dict())
    epoch = update.plan_epoch(experience)
    metrics = update.optimize(experience, epoch, update.fix_targets(experience, epoch, 0.02), 1e-3, 1e-3)
    assert metrics["skipped_steps"] == 2
    assert all(torch.equal(before[k], v) for k, v in update.policy.model.state_dict().items())


def test_the_samples_of_a_skipped_minibatch_are_named(tiny_folder):
    update = make_update(tiny_folder)
    experience = experience_of(update.policy)
    epoch = update.plan_epoch(experience)
    targets = update.fix_targets(experience, epoch, 0.02)
    assert update.optimize(experience, epoch, targets, 0.0, 0.0)["skipped_steps"] == 0 and not update.skipped_samples
    bad = 1
    start = int(experience.lengths_B[:bad].sum())
    targets.returns_R[start] = float("nan")
    metrics = update.optimize(experience, epoch, targets, 0.0, 0.0)
    assert 0 < metrics["skipped_steps"] < metrics["skipped_steps"] + metrics["optimizer_steps"]
    assert bad in update.skipped_samples and len(update.skipped_samples) < len(experience.lengths_B)


def test_value_warm_up_leaves_the_policy_alone(tiny_folder):
    update = make_update(tiny_folder)
    experience = experience_of(update.policy)
    before = copy.deepcopy(update.policy.model.state_dict())
    epoch = update.plan_epoch(experience)
    targets = update.fix_targets(experience, epoch, 0.02)
    update.optimize(experience, epoch, targets, 1e-3, 1e-3, move_policy=False)
    assert all(torch.equal(before[k], v) for k, v in update.policy.model.state_dict().items())
    assert update.optimize(experience, epoch, targets, 1e-3, 1e-3)["grad_norm_policy"] > 0


def test_rollout_metrics_measure_kl_per_sequence(tiny_folder):
    update = make_update(tiny_folder)
    experience = experience_of(update.policy)
    targets = update.fix_targets(experience, update.plan_epoch(experience), 0.02)
    metrics = rollout_metrics(experience, targets)
    expected = float((targets.old_R - experience.reference_R).sum()) / 8
    assert metrics["kl_nats_per_sequence"] == pytest.approx(expected)
    assert metrics["logprob_gap_max"] < 1e-5


def test_bfloat16_compute_keeps_float32_masters(tiny_folder):
    policy = Policy.load(str(tiny_folder))
    masters = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    policy.model.to(torch.bfloat16)
    optimizer = MasterWeightOptimizer(policy.model, OptimizerConfig(), masters)
    part = slice_batch(experience_of(policy).tokens, range(8))
    for _ in range(3):  # steps too small for bfloat16 add up in the masters
        response_logprobs(policy, part).logprob_N.mean().backward()
        optimizer.accumulate()
        optimizer.step(1e-6)
    name, parameter = next(iter(policy.model.named_parameters()))
    assert parameter.dtype == torch.bfloat16 and optimizer.masters[0].dtype == torch.float32
    assert not torch.equal(optimizer.masters[0], masters[name])
    assert torch.equal(parameter, optimizer.masters[0].bfloat16())


def test_optimizer_state_restores_bitwise(tiny_folder):
    def steps(optimizer, policy, count):
        part = slice_batch(experience_of(policy).tokens, range(8))
        for _ in range(count):
            response_logprobs(policy, part).logprob_N.mean().backward()
            optimizer.accumulate()
            optimizer.step(1e-3)

    policy = Policy.load(str(tiny_folder))
    optimizer = MasterWeightOptimizer(policy.model, OptimizerConfig())
    steps(optimizer, policy, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    steps(optimizer, policy, 2)
    other = Policy.load(str(tiny_folder))
    resumed = MasterWeightOptimizer(other.model, OptimizerConfig())
    resumed.load_state_dict(saved)
    steps(resumed, other, 2)
    for a, b in zip(policy.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_prompt_sampler_shows_each_prompt_once_a_pass_and_resumes():
    prompts = [np.array([i], dtype=np.int32) for i in range(10)]
    sampler = Sampler(prompts, seed=0)
    first = [int(p[0]) for p in sampler.draw(10)]
    assert sorted(first) == list(range(10))
    state = sampler.state_dict()
    ahead = [int(p[0]) for p in sampler.draw(7)]
    resumed = Sampler(prompts, seed=5)
    resumed.load_state_dict(state)
    assert [int(p[0]) for p in resumed.draw(7)] == ahead


def test_completion_seeds_differ_and_repeat():
    seeds = {completion_seed(r, s, p, k) for r in range(2) for s in range(3) for p in range(4) for k in range(5)}
    assert len(seeds) == 120 and completion_seed(1, 2, 3, 4) == completion_seed(1, 2, 3, 4)


def test_importing_configs_refuses_what_does_not_fit():
    for changes, word in (
        ({"minibatch_size": 3}, "multiple"),
        ({"advantage": "group"}, "samples_per_prompt"),
        ({"temperature": 0.0}, "temperature"),
        ({"unknown": 1}, "unknown"),
        ({"kl_coefficient": float("nan")}, "kl_coefficient"),
    ):
        with pytest.raises(ValueError, match=word):
            config(**changes)
