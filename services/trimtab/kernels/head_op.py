"""Custom operators: log-prob, lse and entropy from hidden states or from logits, and their gradients.

They carry fake kernels and autograd, so torch.compile sees one node each; `backends` picks what runs inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels import chunked_torch
from trimtab.kernels.backends import backend_for
from trimtab.kernels.statistics import logprob_lse_entropy


@torch.library.custom_op("trimtab::head_logprobs", mutates_args=())
def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, lse, entropy [N]; then what the backward pass uses again, as `chunked_torch.head_forward` says."""
    refuse_bad_temperature(temperature)
    statistics_4N, kept_NV, squash_NV = backend_for(hidden).head_forward(
        hidden, weight, bias, targets, temperature, softcap, keep
    )
    return *logprob_lse_entropy(statistics_4N), kept_NV, squash_NV


@head_logprobs.register_fake
def _(hidden, weight, bias, targets, temperature, softcap, keep):
    rows, dtype = targets.shape[0], chunked_torch.compute_dtype(hidden)
    column = hidden.new_empty(rows, dtype=dtype)
    keeps = keep and backend_for(hidden).name == "torch"
    keeps = keeps and chunked_torch.fits_one_chunk(rows, weight.shape[0], dtype)
    nothing, matrix = (0, 0), (rows, weight.shape[0])
    kept = hidden.new_empty(matrix if keeps else nothing, dtype=dtype)
    squash = hidden.new_empty(matrix if keeps and softcap is not None else nothing, dtype=dtype)
    return column, torch.empty_like(column), torch.empty_like(column), kept, squash


@torch.library.custom_op("trimtab::head_logprobs_backward", mutates_args=())
def head_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float | None,
    row_values: Tensor,
    kept: Tensor,
    squash: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; `row_values` [5, N] is lse, entropy and the three upstreams."""
    return backend_for(hidden).head_backward(
        hidden, weight, bias, targets, temperature, softcap, row_values, kept, squash, needs
    )


@head_logprobs_backward.register_fake
def _(hidden, weight, bias, targets, temperature, softcap, row_values, kept, squash, needs):
    return fake_gradients(hidden, weight, bias, needs)


def _head_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, temperature, ctx.softcap, _ = inputs
    _, lse, entropy, kept, squash = output
    ctx.mark_non_differentiable(kept, squash)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, temperature, lse, entropy, kept, squash)


def _head_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, temperature, lse, entropy, kept, squash = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    row_values = torch.stack((lse, entropy, *(upstream_or_zero(grad, lse) for grad in upstream[:3])))
    gradients = head_logprobs_backward(
        hidden, weight, bias, targets, temperature, ctx.softcap, row_values, kept, squash, needs
    )
    return *wanted(gradients, needs), None, None, None, None


head_logprobs.register_autograd(_head_backward, setup_context=_head_setup)


def logits_logprobs_now(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, lse, entropy [N] of logits that exist already, without autograd."""
    refuse_bad_temperature(temperature)
    return logprob_lse_entropy(backend_for(logits).logits_forward(logits, targets, temperature))


logits_logprobs = torch.library.custom_op("trimtab::logits_logprobs", mutates_args=())(logits_logprobs_now)


@logits_logprobs.register_fake
def _(logits, targets, temperature):
    column = logits.new_empty(targets.shape[0], dtype=chunked_torch.compute_dtype(logits))
    return column, torch.empty_like(column), torch.empty_like(column)


@torch.library.custom_op("trimtab::logits_logprobs_backward", mutates_args=())
def logits_logprobs_backward(logits: Tensor, targets: Tensor, temperature: Tensor, row_values: Tensor) -> Tensor:
    """Gradient of the logits; `row_values` as above."""
    return backend_for(logits).logits_backward(logits, targets, temperature, row_values)


@logits_logprobs_backward.register_fake
def _(logits, targets, temperature, row_values):
    return torch.empty_like(logits)


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, entropy = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, lse, entropy)


def _logits_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, targets, temperature, lse, entropy = ctx.saved_tensors
    row_values = torch.stack((lse, entropy, *(upstream_or_zero(grad, lse) for grad in upstream)))
    return logits_logprobs_backward(logits, targets, temperature, row_values), None, None


logits_logprobs.register_autograd(_logits_backward, setup_context=_logits_setup)


def refuse_bad_temperature(temperature: Tensor) -> None:
    """Raise ValueError unless every row's temperature is above 0 (NaN is not)."""
    if not bool((temperature > 0).all()):
        raise ValueError("temperature must be positive")


def fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What the gradient operators return, by shape alone."""
    nothing = hidden.new_empty(0)
    empties = (hidden.new_empty(0), weight.new_empty(0), nothing if bias is None else bias.new_empty(0))
    fulls = (hidden, weight, bias)
    return tuple(
        torch.empty_like(full) if need and full is not None else empty
        for full, empty, need in zip(fulls, empties, needs, strict=True)
    )


def upstream_or_zero(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.to(like.dtype)


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """None in place of the empty tensors that operators return for gradients nobody needs."""
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
