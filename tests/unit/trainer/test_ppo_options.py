"""PPO-ptx, the moving average, GRPO's baselines and value warm-up, by hand-computed numbers and what they promise."""

import numpy as np
import pytest
import torch

from tests.unit.trainer.test_ppo_update import experience_of, make_update
from trimtab.models.policy import Policy
from trimtab.trainer.forward import TokenBatch
from trimtab.trainer.moving_average import MovingAverage
from trimtab.trainer.optimizer import MasterWeightOptimizer, masters_of
from trimtab.trainer.ppo.advantages import group_relative_advantages, whiten
from trimtab.trainer.ppo.episode_record import pack_episode, unpack_episode
from trimtab.trainer.ppo.experience import Episode
from trimtab.trainer.ppo.pretraining import Pretraining
from trimtab.trainer.sft import accumulate_nll, mean_nll
from trimtab.trainer.stages import OptimizerConfig
from trimtab_client import Completion, ModelVersion, VersionRun


def texts(count=12) -> TokenBatch:
    random = np.random.default_rng(3)
    sequences = tuple(random.integers(3, 48, int(random.integers(3, 15))).astype(np.int32) for _ in range(count))
    return TokenBatch(sequences, (1,) * count)


def pretraining(coefficient=27.8, batch_size=12, micro=10_000) -> Pretraining:
    return Pretraining(texts(), coefficient=coefficient, batch_size=batch_size, micro_batch_tokens=micro, seed=0)


@pytest.mark.parametrize("micro_batch_tokens", [16, 10_000])
def test_ptx_adds_the_coefficient_times_the_mean_nll_gradient(tiny_folder, micro_batch_tokens):
    def gradients(accumulate):
        policy = Policy.load(str(tiny_folder), dtype="float64")
        optimizer = MasterWeightOptimizer(policy.model, OptimizerConfig())
        loss = accumulate(policy, optimizer)
        return loss, [p.grad for p in policy.model.parameters()]

    ours, scaled = gradients(pretraining(27.8, micro=micro_batch_tokens).accumulate)
    plain, expected = gradients(lambda policy, optimizer: accumulate_nll(policy, texts(), range(12), 100, optimizer))
    assert ours == pytest.approx(plain)
    for got, want in zip(scaled, expected, strict=True):
        torch.testing.assert_close(got, 27.8 * want)


def test_ptx_gradients_join_those_of_the_ppo_minibatch(tiny_folder):
    def gradients(ptx):
        update = make_update(tiny_folder, dtype="float64")
        update.pretraining = ptx
        experience = experience_of(update.policy)
        first, *rest = update.plan_epoch(experience)
        targets = update.fix_targets(experience, [first, *rest], 0.02)
        update._minibatch_gradients(first, targets, move_policy=True)
        return [p.grad.clone() for p in update.policy.model.parameters()]

    alone = Policy.load(str(tiny_folder), dtype="float64")
    pretraining().accumulate(alone, MasterWeightOptimizer(alone.model, OptimizerConfig()))
    both, ppo = gradients(pretraining()), gradients(None)
    for sum_, one, other in zip(both, ppo, (p.grad for p in alone.model.parameters()), strict=True):
        torch.testing.assert_close(sum_, one + other)


def test_ptx_keeps_the_text_that_ppo_alone_unlearns(tiny_folder):
    def nll_after(ptx):
        update = make_update(tiny_folder)
        update.pretraining = ptx
        experience = experience_of(update.policy)
        before = mean_nll(update.policy, texts(), 1000)
        for _ in range(8):
            epoch = update.plan_epoch(experience)
            metrics = update.optimize(experience, epoch, update.fix_targets(experience, epoch, 0.0), 3e-3, 1e-3)
        return mean_nll(update.policy, texts(), 1000) - before, metrics

    with_ptx, metrics = nll_after(pretraining(1.0))
    without, plain = nll_after(None)
    assert with_ptx < -0.1 < without and 0 < metrics["loss_ptx"] < 4.5 and "loss_ptx" not in plain


def test_ptx_is_still_while_the_value_model_warms_up(tiny_folder):
    update = make_update(tiny_folder)
    update.pretraining = pretraining()
    drawn = update.pretraining.state_dict()
    experience = experience_of(update.policy)
    epoch = update.plan_epoch(experience)
    targets = update.fix_targets(experience, epoch, 0.02)
    before = [p.detach().clone() for p in update.policy.model.parameters()]
    update.optimize(experience, epoch, targets, 1e-3, 1e-3, move_policy=False)
    assert all(torch.equal(a, b) for a, b in zip(before, update.policy.model.parameters(), strict=True))
    assert update.pretraining.state_dict() == drawn


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_moving_average_is_the_hand_computed_one_and_leaves_the_model_bitwise_alone(tiny_folder, dtype):
    policy = Policy.load(str(tiny_folder))
    optimizer = MasterWeightOptimizer(policy.model, OptimizerConfig(), masters_of(policy.model, dtype))
    average = MovingAverage(policy.model, optimizer, 0.9)
    first = optimizer.masters[0].detach().clone()
    with torch.no_grad():
        for master, parameter in zip(optimizer.masters, optimizer.parameters, strict=True):
            master.add_(1.0)
            parameter.copy_(master)
    average.update()
    torch.testing.assert_close(average.average[0], 0.9 * first + 0.1 * (first + 1.0))
    own = [parameter.detach().clone() for parameter in policy.model.parameters()]
    with average.in_the_model():
        inside = next(policy.model.parameters())
        torch.testing.assert_close(inside, average.average[0].to(inside.dtype), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(own, policy.model.parameters(), strict=True))


def test_grpo_takes_the_group_mean_and_deviation():
    lengths = torch.tensor([2, 1, 1, 1, 3, 1])
    rewards = torch.tensor([0.5, 0.5, 2.0, 3.0, 7.0, 1.0, 2.0, 4.0, 7.0])  # returns 1 2 3 | 7 7 7
    advantages = group_relative_advantages(rewards, lengths, 3)
    scale = (2 / 3) ** 0.5 + 1e-4
    expected = torch.tensor([-1 / scale, -1 / scale, 0.0, 1 / scale, 0.0, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(advantages, expected)


def test_grpo_keeps_its_own_scale_and_needs_no_value_model(tiny_folder):
    for advantage in ("grpo", "group"):
        update = make_update(tiny_folder, advantage=advantage, samples_per_prompt=4)
        update.value_model = update.value_optimizer = None
        experience = experience_of(update.policy)
        epoch = update.plan_epoch(experience)
        advantages = update.fix_targets(experience, epoch, 0.02).advantages_R
        whitened = torch.allclose(advantages, whiten(advantages), atol=1e-5)
        assert whitened == (advantage == "group")
        metrics = update.optimize(experience, epoch, update.fix_targets(experience, epoch, 0.02), 1e-3, 1e-3)
        assert metrics["grad_norm_policy"] > 0 and metrics["loss_value"] == 0


def test_the_value_model_learns_during_its_warm_up(tiny_folder):
    update = make_update(tiny_folder)
    experience = experience_of(update.policy)
    losses = []
    for _ in range(12):
        epoch = update.plan_epoch(experience)
        targets = update.fix_targets(experience, epoch, 0.02)
        losses.append(update.optimize(experience, epoch, targets, 1e-3, 3e-3, move_policy=False)["loss_value"])
    assert losses[-1] < 0.6 * losses[0]


def test_an_episode_comes_back_from_the_journal_bit_for_bit():
    completion = Completion(
        prompt_index=3,
        sample_index=1,
        prompt_token_ids=np.array([1, 2, 3], np.int32),
        token_ids=np.array([4, 5], np.int32),
        logprobs=np.array([-0.1, np.float32(-1 / 3)], np.float32),
        text='a "b" \n ü',
        finish_reason="stop",
        versions=(
            VersionRun(ModelVersion("r", "policy", 1, "d1"), 1),
            VersionRun(ModelVersion("r", "policy", 2, "d2"), 1),
        ),
        seed=(1 << 64) - 1,
    )
    hidden = np.arange(8, dtype=np.uint16).reshape(2, 4)
    episode = Episode(completion, 0.1, float(np.float32(0.3)), np.array([-2.0, -3.0], np.float32), hidden, 0.7)
    back = unpack_episode(pack_episode(episode))
    assert (back.score, back.normalized_score, back.gold_score) == (0.1, episode.normalized_score, 0.7)
    for name in ("prompt_index", "sample_index", "text", "finish_reason", "versions", "seed"):
        assert getattr(back.completion, name) == getattr(completion, name)
    for name in ("prompt_token_ids", "token_ids", "logprobs"):
        assert getattr(back.completion, name).tobytes() == getattr(completion, name).tobytes()
    assert np.array_equal(back.reference_logprobs, episode.reference_logprobs)
    assert back.reference_hidden.dtype == np.uint16 and np.array_equal(back.reference_hidden, hidden)
