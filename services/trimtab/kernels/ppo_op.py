"""Custom operator: the PPO loss over the LM head; its gradients are made with the loss and only scaled later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from trimtab.kernels import chunked_torch
from trimtab.kernels.backends import backend_for
from trimtab.kernels.head_op import fake_gradients, refuse_bad_temperature, wanted
from trimtab.kernels.ppo_terms import PpoSettings, RowTargets


@torch.library.custom_op("trimtab::ppo_head", mutates_args=())
def ppo_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float | None,
    old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    hint_lse: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coefficient: float,
    kl_coefficient: float,
    kl_estimator: str,
    normalizer: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, logprob and lse [N], and the loss's gradients of hidden states, weight and bias."""
    refuse_bad_temperature(temperature)
    settings = PpoSettings(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy_coefficient=entropy_coefficient,
        kl_coefficient=kl_coefficient,
        kl_estimator=cast(Literal["k2", "k3"], kl_estimator),
    )
    fixed = RowTargets(old, advantages, weights, reference)
    return backend_for(hidden).ppo(
        hidden, weight, bias, targets, temperature, softcap, fixed, hint_lse, settings, normalizer, needs
    )


@ppo_head.register_fake
def _(hidden, weight, bias, targets, *arguments):
    column = hidden.new_empty(targets.shape[0], dtype=chunked_torch.compute_dtype(hidden))
    gradients = fake_gradients(hidden, weight, bias, arguments[-1])
    return column.new_empty(()), column, torch.empty_like(column), *gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)  # else zeros as large as the weight stand in for each output's missing gradient
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * ctx.inputs
    made = ctx.saved_tensors
    gradients = made if _is_one(upstream) else [gradient * upstream.to(gradient.dtype) for gradient in made]
    return *wanted(gradients, ctx.needs_input_grad[:3]), *(None for _ in range(ctx.inputs - 3))


def _is_one(upstream: Tensor) -> bool:
    """Whether gradients need no scaling, that of the head's weight being as large as the weight. False where asking
    would wait for a GPU, or where there is no number yet."""
    return type(upstream) is Tensor and upstream.device.type == "cpu" and bool(upstream == 1)


ppo_head.register_autograd(_backward, setup_context=_setup)
