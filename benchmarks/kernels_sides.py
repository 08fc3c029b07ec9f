"""What each side of the kernel comparison runs: a function of one step's tensors, with or without gradient.

Suffixes: N rows, D hidden size, V vocabulary. A side that cannot do a task, or is not installed, says so by None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from trimtab.kernels.api import exact_kl, ppo_loss, selected_logprobs, selected_logprobs_from_logits
from trimtab.kernels.ppo_terms import PpoSettings

TASKS = ("forward", "train", "ppo", "logits", "kl")
"""log-probs and entropy; the same with gradients; the PPO loss with gradients; from logits; exact KL with gradients."""
SIDES = ("trimtab", "torch", "compile", "liger", "cce", "verl")


@dataclass(frozen=True)
class Shape:
    """Rows, hidden size and vocabulary of one measurement."""

    rows: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}x{self.vocab}"


@dataclass(frozen=True)
class Inputs:
    """One step's tensors; `logits_NV` only for the task from logits."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    reference_ND: torch.Tensor
    targets_N: torch.Tensor
    old_N: torch.Tensor
    advantages_N: torch.Tensor
    lse_N: torch.Tensor
    logits_NV: torch.Tensor


def make_inputs(shape: Shape, task: str, dtype: torch.dtype, device: str) -> Inputs:
    """Random, of logits with a deviation of 3; old log-probs a little beside the present ones."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden = normal(shape.rows, shape.width).to(dtype)
    weight = (normal(shape.vocab, shape.width) * (3 / shape.width**0.5)).to(dtype)
    targets = torch.randint(shape.vocab, (shape.rows,), generator=generator, device=device)
    reference = (hidden + 0.1 * normal(shape.rows, shape.width)).to(dtype)
    with torch.no_grad():
        now = selected_logprobs(hidden, weight, targets)
        logits = hidden @ weight.T if task == "logits" else hidden.new_empty(0)
    old = now.logprob_N + 0.1 * normal(shape.rows)
    for tensor in (hidden, weight, logits):
        tensor.requires_grad_(task != "forward")
    return Inputs(hidden, weight, reference, targets, old, normal(shape.rows), now.lse_N, logits)


def step_of(side: str, task: str, inputs: Inputs) -> Callable[[], Any] | None:
    """One step of a side: forward, and backward where the task has gradients; None where it cannot."""
    if side == "trimtab":
        return lambda: _stepped(_trimtab(task, inputs), inputs, task)
    if side == "torch":
        return lambda: _stepped(_naive(task, inputs), inputs, task)
    if side == "compile":
        compiled = torch.compile(_naive)
        return lambda: _stepped(compiled(task, inputs), inputs, task)
    module = {"liger": "liger_kernel", "cce": "cut_cross_entropy", "verl": "verl"}[side]
    if task not in ("forward", "train") or find_spec(module) is None:
        return None
    return lambda: _stepped(_PEERS[side](inputs), inputs, task)


def _stepped(result: torch.Tensor | tuple[torch.Tensor, ...], inputs: Inputs, task: str) -> Any:
    """The result itself, or the gradients of its sum."""
    if task == "forward":
        return result
    total = result if isinstance(result, torch.Tensor) else sum((part.sum() for part in result), torch.zeros(()))
    leaves = (inputs.logits_NV,) if task == "logits" else (inputs.hidden_ND, inputs.weight_VD)
    return torch.autograd.grad(total.sum(), leaves)


def _trimtab(task: str, i: Inputs) -> Any:
    if task == "logits":
        result = selected_logprobs_from_logits(i.logits_NV, i.targets_N)
        return result.logprob_N, result.entropy_N
    if task == "ppo":
        settings, rows = PpoSettings(), len(i.old_N)
        heads = (i.hidden_ND, i.weight_VD, i.targets_N)
        fixed = {"settings": settings, "hint_lse_N": i.lse_N, "normalizer": rows}
        return ppo_loss(*heads, i.old_N, i.advantages_N, **fixed).loss
    if task == "kl":
        return exact_kl(i.hidden_ND, i.weight_VD, i.reference_ND, i.weight_VD.detach(), i.targets_N).kl_N
    result = selected_logprobs(i.hidden_ND, i.weight_VD, i.targets_N)
    return result.logprob_N, result.entropy_N


def _naive(task: str, i: Inputs) -> Any:
    """Plain torch over whole logits, upcast to float32 as training code has it."""
    logits_NV = (i.logits_NV if task == "logits" else i.hidden_ND @ i.weight_VD.T).float()
    logp_NV = torch.log_softmax(logits_NV, 1)
    logprob_N = logp_NV.gather(1, i.targets_N[:, None])[:, 0]
    if task == "ppo":
        ratio_N = torch.exp(logprob_N - i.old_N)
        bounded_N = ratio_N.clamp(0.8, 1.2)
        return -torch.minimum(ratio_N * i.advantages_N, bounded_N * i.advantages_N).mean()
    if task == "kl":
        logr_NV = torch.log_softmax((i.reference_ND @ i.weight_VD.detach().T).float(), 1)
        return (logp_NV.exp() * (logp_NV - logr_NV)).sum(1)
    return logprob_N, -(logp_NV.exp() * logp_NV).sum(1)


def _liger(i: Inputs) -> Any:
    """Mean cross entropy: it has no log-probs per row, and no entropy."""
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return loss(i.weight_VD, i.hidden_ND, i.targets_N)


def _cce(i: Inputs) -> Any:
    """Log-probs per row, no entropy."""
    return -import_module("cut_cross_entropy").linear_cross_entropy(
        i.hidden_ND, i.weight_VD, i.targets_N, reduction="none"
    )


def _verl(i: Inputs) -> Any:
    """Log-probs and entropy per row."""
    run = import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return run(i.hidden_ND, i.weight_VD, i.targets_N, 1.0, "none")


_PEERS: dict[str, Callable[[Inputs], Any]] = {"liger": _liger, "cce": _cce, "verl": _verl}
