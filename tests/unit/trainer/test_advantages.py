"""GAE, group advantages, token rewards and whitening against brute force and hand-computed batches."""

import pytest
import torch

from trimtab.trainer.ppo.advantages import (
    explained_variance,
    generalized_advantages,
    group_advantages,
    token_rewards,
    whiten,
)
from trimtab.trainer.ppo.kl_controller import KLController

LENGTHS = torch.tensor([3, 1, 6, 2])


def random(seed: int) -> torch.Tensor:
    return torch.randn(int(LENGTHS.sum()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force_gae(rewards, values, lengths, gamma, lam):
    out = []
    for r, v in zip(rewards.split(lengths.tolist()), values.split(lengths.tolist()), strict=True):
        steps = len(r)
        delta = [r[t] + (gamma * v[t + 1] if t + 1 < steps else 0) - v[t] for t in range(steps)]
        out += [sum((gamma * lam) ** k * delta[t + k] for k in range(steps - t)) for t in range(steps)]
    return torch.stack(out)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_equals_the_plain_double_sum(gamma, lam):
    rewards, values = random(1), random(2)
    ours = generalized_advantages(rewards, values, LENGTHS, gamma, lam)
    torch.testing.assert_close(ours, brute_force_gae(rewards, values, LENGTHS, gamma, lam))


def test_lambda_one_gives_monte_carlo_returns():
    rewards, values = random(3), random(4)
    returns = generalized_advantages(rewards, values, LENGTHS, 1.0, 1.0) + values
    expected = torch.cat([r.flip(0).cumsum(0).flip(0) for r in rewards.split(LENGTHS.tolist())])
    torch.testing.assert_close(returns, expected)


def test_no_rewards_and_no_values_give_no_advantages():
    zeros = torch.zeros(int(LENGTHS.sum()))
    assert generalized_advantages(zeros, zeros, LENGTHS, 1.0, 0.95).abs().max() == 0


def test_no_rewards_and_lambda_one_give_minus_the_values():
    values = random(5)
    torch.testing.assert_close(generalized_advantages(torch.zeros_like(values), values, LENGTHS, 1.0, 1.0), -values)


def test_token_rewards_put_the_score_on_the_last_token_and_kl_on_each():
    logp, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), logp, ref, torch.tensor([2, 1]), 0.1)
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 10.1, 20.0]))


def test_group_advantages_subtract_the_mean_of_the_other_samples():
    rewards = torch.tensor([1.0, 1.0, 5.0, 3.0, 3.0, 3.0])
    advantages = group_advantages(rewards, torch.tensor([2, 1, 1, 2]), 2)
    torch.testing.assert_close(advantages, torch.tensor([-3.0, -3.0, 3.0, -3.0, 3.0, 3.0]))


def test_whitening_is_by_population_variance_and_can_keep_the_mean():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    plain = whiten(values)
    assert abs(float(plain.mean())) < 1e-6
    assert float(plain.var(unbiased=False)) == pytest.approx(1, abs=1e-6)
    assert float(whiten(values, shift_mean=False).mean()) == pytest.approx(3.0)


def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.ones(3), returns) == pytest.approx(0)


def test_adaptive_beta_follows_the_hand_computed_sequence():
    controller = KLController(0.2, target_nats_per_sequence=6.0, horizon_episodes=10_000)
    expected = 0.2
    for kl, error in ((12.0, 0.2), (6.6, 0.1), (6.0, 0.0), (0.0, -0.2)):
        controller.update(kl, episodes=500)
        expected *= 1 + error * 500 / 10_000
        assert controller.coefficient == pytest.approx(expected, rel=1e-9)
    fixed = KLController(0.2, None, 10_000)
    fixed.update(100.0, 500)
    assert fixed.coefficient == 0.2
