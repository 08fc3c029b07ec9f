"""The one door of the room: log-probs, entropy, KL and the PPO loss from hidden states, or from logits.

Trainer and reference call the same functions, so their log-probs can be subtracted. Suffixes: N rows, D hidden size,
V vocabulary. All results are float32 (float64 for float64 hidden states) and in nats; no function
but `selected_logprobs_from_logits` ever holds [N, V].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from trimtab.kernels.chunked_torch import compute_dtype
from trimtab.kernels.head_op import head_logprobs, logits_logprobs, logits_logprobs_now
from trimtab.kernels.kl_op import two_head_kl
from trimtab.kernels.ppo_op import ppo_head
from trimtab.kernels.ppo_terms import PpoSettings


class SelectedLogprobs(NamedTuple):
    """Per row, in nats."""

    logprob_N: torch.Tensor
    lse_N: torch.Tensor
    entropy_N: torch.Tensor


class ExactKl(NamedTuple):
    """Per row, in nats; `kl_N` is KL(π‖ref) over the whole vocabulary. The reference's numbers carry no gradient."""

    logprob_N: torch.Tensor
    lse_N: torch.Tensor
    entropy_N: torch.Tensor
    kl_N: torch.Tensor
    reference_logprob_N: torch.Tensor
    reference_lse_N: torch.Tensor


class PpoLoss(NamedTuple):
    """`loss` is a scalar with gradient; the log-probs and lse that it was made of are for metrics."""

    loss: torch.Tensor
    logprob_N: torch.Tensor
    lse_N: torch.Tensor


def selected_logprobs(
    hidden_ND: torch.Tensor,
    head_weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> SelectedLogprobs:
    """log_softmax(softcap(hidden · weightᵀ + bias) / temperature) at `targets_N`, with lse and entropy.

    Differentiable in hidden, weight and bias, for any upstream gradient; rows whose upstream is 0 cost nothing.

    Args:
        temperature: one for all rows, or one a row [N]; above 0.
        softcap: c of c · tanh(z / c), before the temperature.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    temperature_N = _checked(hidden_ND, head_weight_VD, targets_N, temperature)
    keep = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden_ND, head_weight_VD, bias)
    )
    columns = head_logprobs(hidden_ND, head_weight_VD, bias, targets_N, temperature_N, softcap, keep)
    return SelectedLogprobs(*columns[:3])


def selected_logprobs_from_logits(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, *, temperature: float | torch.Tensor = 1.0
) -> SelectedLogprobs:
    """The same from logits that exist already: one pass forward, one backward.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    if logits_NV.dim() != 2 or targets_N.shape != logits_NV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_NV.shape)}, targets {tuple(targets_N.shape)}")
    recorded = torch.compiler.is_compiling() or (torch.is_grad_enabled() and logits_NV.requires_grad)
    compute = logits_logprobs if recorded else logits_logprobs_now  # dispatch takes a tenth of a millisecond a step
    return SelectedLogprobs(*compute(logits_NV, targets_N, _per_row(temperature, logits_NV)))


def exact_kl(
    hidden_ND: torch.Tensor,
    head_weight_VD: torch.Tensor,
    reference_hidden_ND: torch.Tensor,
    reference_weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    reference_bias: torch.Tensor | None = None,
    reference_softcap: float | None = None,
) -> ExactKl:
    """KL(π‖ref) of the two heads' whole distributions, never negative, with log-probs and the policy's entropy.

    Differentiable in the policy's hidden states, weight and bias; the reference is fixed. Its hidden size may differ.
    A hidden state that came over the wire in bfloat16 is used as it is: its head must be the reference's.

    Raises:
        ValueError: shapes that do not fit (the vocabularies must be one), or a temperature that is not positive.
    """
    temperature_N = _checked(hidden_ND, head_weight_VD, targets_N, temperature)
    _checked(reference_hidden_ND, reference_weight_VD, targets_N, temperature)
    if len(head_weight_VD) != len(reference_weight_VD):
        raise ValueError(f"vocabularies of {len(head_weight_VD)} and {len(reference_weight_VD)} tokens")
    fixed_bias = None if reference_bias is None else reference_bias.detach()
    reference = (reference_hidden_ND.detach(), reference_weight_VD.detach(), fixed_bias, reference_softcap)
    columns = two_head_kl(hidden_ND, head_weight_VD, bias, softcap, *reference, targets_N, temperature_N)
    return ExactKl(*columns)


def ppo_loss(
    hidden_ND: torch.Tensor,
    head_weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    *,
    settings: PpoSettings,
    weights_N: torch.Tensor | None = None,
    reference_logprobs_N: torch.Tensor | None = None,
    hint_lse_N: torch.Tensor | None = None,
    normalizer: float = 1.0,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> PpoLoss:
    """Σ over rows of the loss of `ppo_terms`, over `normalizer`: three matrix products forward and backward together.

    The gradients are made while the loss is; `backward` only scales them, which is exact where the upstream is 1, so
    give the global token count as `normalizer`. Without gradient enabled only the loss is computed.

    Args:
        weights_N: truncated importance weights; 1 by default.
        reference_logprobs_N: for the KL loss of the settings.
        hint_lse_N: the old policy's lse of each row. A GPU needs it to spare the search for each row's maximum; a hint
            that is far off is noticed and its rows are done again. Results do not depend on it beyond rounding.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive, or a KL loss without reference.
    """
    temperature_N = _checked(hidden_ND, head_weight_VD, targets_N, temperature)
    weights_N = torch.ones_like(old_logprobs_N) if weights_N is None else weights_N
    columns = (old_logprobs_N, advantages_N, weights_N, reference_logprobs_N, hint_lse_N)
    if any(column is not None and column.shape != targets_N.shape for column in columns):
        shapes = [None if column is None else tuple(column.shape) for column in columns]
        raise ValueError(f"{len(targets_N)} rows, but old, advantages, weights, reference and hint are {shapes}")
    if settings.kl_coefficient and reference_logprobs_N is None:
        raise ValueError("kl_coefficient needs reference_logprobs_N")
    recording = torch.is_grad_enabled()
    needs = [recording and t is not None and t.requires_grad for t in (hidden_ND, head_weight_VD, bias)]
    dtype = compute_dtype(hidden_ND)
    old, advantages, weights, reference, hint = (
        None if column is None else column.detach().to(dtype) for column in columns
    )
    loss, logprob_N, lse_N, *_ = ppo_head(
        hidden_ND, head_weight_VD, bias, targets_N, temperature_N, softcap,
        old, advantages, weights, reference, hint, settings.clip_low, settings.clip_high, settings.dual_clip,
        settings.entropy_coefficient, settings.kl_coefficient, settings.kl_estimator, normalizer, needs,
    )  # fmt: skip
    return PpoLoss(loss, logprob_N, lse_N)


def _checked(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """Temperature per row, once the shapes fit."""
    if hidden_ND.dim() != 2 or targets_N.shape != hidden_ND.shape[:1] or weight_VD.shape[1:] != hidden_ND.shape[1:]:
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)}, targets {tuple(targets_N.shape)}"
        )
    return _per_row(temperature, hidden_ND)


def _per_row(temperature: float | torch.Tensor, like_ND: torch.Tensor) -> torch.Tensor:
    one_or_all = torch.as_tensor(temperature, dtype=compute_dtype(like_ND), device=like_ND.device)
    return one_or_all.expand(len(like_ND)).contiguous()
