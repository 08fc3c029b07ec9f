"""Custom operator: log-prob, lse, entropy and exact KL(π‖ref) from the hidden states of two LM heads, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels import chunked_torch
from trimtab.kernels.backends import backend_for
from trimtab.kernels.head_op import fake_gradients, refuse_bad_temperature, upstream_or_zero, wanted
from trimtab.kernels.statistics import logprob_lse_entropy


@torch.library.custom_op("trimtab::two_head_kl", mutates_args=())
def two_head_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    reference_softcap: float | None,
    targets: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The policy's logprob, lse, entropy; KL; the reference's logprob and lse, [N] each."""
    refuse_bad_temperature(temperature)
    policy = (hidden, weight, bias, softcap)
    reference = (reference_hidden, reference_weight, reference_bias, reference_softcap)
    policy_4N, reference_4N, kl = backend_for(hidden).kl_forward(policy, reference, targets, temperature)
    reference_logprob, reference_lse, _ = logprob_lse_entropy(reference_4N)
    return *logprob_lse_entropy(policy_4N), kl, reference_logprob, reference_lse


@two_head_kl.register_fake
def _(hidden, weight, bias, softcap, reference_hidden, reference_weight, reference_bias, reference_softcap, targets, t):
    column = hidden.new_empty(targets.shape[0], dtype=chunked_torch.compute_dtype(hidden))
    return tuple(torch.empty_like(column) for _ in range(6))


@torch.library.custom_op("trimtab::two_head_kl_backward", mutates_args=())
def two_head_kl_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    reference_softcap: float | None,
    targets: Tensor,
    temperature: Tensor,
    row_values: Tensor,
    kl_values: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the policy's hidden states, weight and bias; rows of values as `chunked_kl.kl_backward` says."""
    policy = (hidden, weight, bias, softcap)
    reference = (reference_hidden, reference_weight, reference_bias, reference_softcap)
    return backend_for(hidden).kl_backward(policy, reference, targets, temperature, row_values, kl_values, needs)


@two_head_kl_backward.register_fake
def _(hidden, weight, bias, softcap, rh, rw, rb, rs, targets, temperature, row_values, kl_values, needs):
    return fake_gradients(hidden, weight, bias, needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ctx.softcap, r_hidden, r_weight, r_bias, ctx.reference_softcap, targets, temperature = inputs
    _, lse, entropy, kl, reference_logprob, reference_lse = output
    ctx.mark_non_differentiable(reference_logprob, reference_lse)
    ctx.set_materialize_grads(False)
    heads = (hidden, weight, bias, r_hidden, r_weight, r_bias)
    ctx.save_for_backward(*heads, targets, temperature, lse, entropy, kl, reference_lse)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    *heads, targets, temperature, lse, entropy, kl, reference_lse = ctx.saved_tensors
    hidden, weight, bias, r_hidden, r_weight, r_bias = heads
    needs = list(ctx.needs_input_grad[:3])
    g, u, h, k = (upstream_or_zero(grad, lse) for grad in upstream[:4])
    gradients = two_head_kl_backward(
        hidden, weight, bias, ctx.softcap, r_hidden, r_weight, r_bias, ctx.reference_softcap, targets, temperature,
        torch.stack((lse, entropy, g, u, h)), torch.stack((reference_lse, kl, k)), needs,
    )  # fmt: skip
    return *wanted(gradients, needs), None, None, None, None, None, None, None


two_head_kl.register_autograd(_backward, setup_context=_setup)
