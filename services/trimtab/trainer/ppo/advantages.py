"""Token rewards, advantages and returns of a batch of episodes; formulas with their sources.

All arrays are flat over the batch's response tokens [R], sequence after sequence; `lengths` splits them.
"""

from __future__ import annotations

import torch

WHITEN_EPS = 1e-8
GROUP_EPS = 1e-4


def token_rewards(
    scores_B: torch.Tensor,
    logprobs_R: torch.Tensor,
    reference_logprobs_R: torch.Tensor,
    lengths: torch.Tensor,
    kl_coefficient: float,
) -> torch.Tensor:
    """r_t = −β (log π_old − log π_ref) (k1), plus the score at the last token (InstructGPT, eq. 2)."""
    rewards_R = -kl_coefficient * (logprobs_R - reference_logprobs_R)
    rewards_R[lengths.cumsum(0) - 1] += scores_B
    return rewards_R


def generalized_advantages(
    rewards_R: torch.Tensor, values_R: torch.Tensor, lengths: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t, V = 0 behind the last token (GAE, arXiv:1506.02438)."""
    rewards_BT, values_BT = _pad(rewards_R, lengths), _pad(values_R, lengths)
    advantages_BT = torch.zeros_like(rewards_BT)
    running_B = next_value_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        running_B = delta_B + gamma * lam * running_B
        advantages_BT[:, t] = running_B
        next_value_B = values_BT[:, t]
    return advantages_BT[_mask(lengths)]


def group_advantages(rewards_R: torch.Tensor, lengths: torch.Tensor, samples_per_prompt: int) -> torch.Tensor:
    """Each episode's return less the mean return of its prompt's other samples (RLOO, arXiv:2402.14740).

    Episodes of a prompt stand next to each other.
    """
    returns_B = torch.stack([part.sum() for part in rewards_R.split(lengths.tolist())])
    groups = returns_B.view(-1, samples_per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (samples_per_prompt - 1)
    return (groups - others).flatten().repeat_interleave(lengths)


def group_relative_advantages(rewards_R: torch.Tensor, lengths: torch.Tensor, samples_per_prompt: int) -> torch.Tensor:
    """Each episode's return less the mean of its prompt's samples, over their deviation (GRPO, arXiv:2402.03300).

    Zeros for a prompt whose returns are all equal. Episodes of a prompt stand next to each other.
    """
    returns_B = torch.stack([part.sum() for part in rewards_R.split(lengths.tolist())])
    groups = returns_B.view(-1, samples_per_prompt)
    centred = groups - groups.mean(1, keepdim=True)
    scaled = centred / (groups.std(1, keepdim=True, unbiased=False) + GROUP_EPS)
    return scaled.flatten().repeat_interleave(lengths)


def whiten(values_R: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """(x − mean) / √(population variance + 1e-8) over the batch's response tokens; scale only without the shift."""
    mean, variance = values_R.mean(), values_R.var(unbiased=False)
    whitened = (values_R - mean) * torch.rsqrt(variance + WHITEN_EPS)
    return whitened if shift_mean else whitened + mean


def explained_variance(values_R: torch.Tensor, returns_R: torch.Tensor) -> float:
    """1 − Var(returns − values) / Var(returns) over the whole batch; 0 where returns do not vary."""
    variance = returns_R.var(unbiased=False)
    if float(variance) == 0:
        return 0.0
    return float(1 - (returns_R - values_R).var(unbiased=False) / variance)


def _mask(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(int(lengths.max()), device=lengths.device)[None, :] < lengths[:, None]


def _pad(flat_R: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[R] → [B, T], zeros behind each sequence's last token.

    Zeros leave the recursion untouched: running and next value are 0 until the last token is reached.
    """
    padded = flat_R.new_zeros(len(lengths), int(lengths.max()))
    padded[_mask(lengths)] = flat_R
    return padded
