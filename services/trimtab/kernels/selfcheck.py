"""Start-up check: the backend that will serve is compared with plain torch in float64 on a small random input."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trimtab.kernels import oracle
from trimtab.kernels.api import exact_kl, ppo_loss, selected_logprobs, selected_logprobs_from_logits
from trimtab.kernels.backends import backend_for
from trimtab.kernels.ppo_terms import PpoSettings

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 5e-5
"""Of a gradient, relative in the Frobenius norm; the input is float32."""


class KernelMismatchError(RuntimeError):
    """A backend computes other numbers than plain torch; it must not serve."""


def check_selected_logprobs(device: torch.device | str = "cpu") -> None:
    """Raise KernelMismatchError if log-probs, lse or entropy are off by more than 2e-5, from hidden or logits."""
    hidden, weight, targets, _ = _inputs(device)
    logits = oracle.head_logits(hidden, weight, 0.7)
    want = oracle.selected(logits, targets)
    _compare("selected_logprobs", selected_logprobs(hidden, weight, targets, temperature=0.7), want)
    bare = (logits * 0.7).float()
    _compare("selected_logprobs_from_logits", selected_logprobs_from_logits(bare, targets, temperature=0.7), want)


def check_training_kernels(device: torch.device | str = "cpu") -> None:
    """`check_selected_logprobs`, and the gradients, the PPO loss and the exact KL.

    Raises:
        KernelMismatchError: numbers off by more than 2e-5, or gradients by more than 5e-5 of their norm.
    """
    check_selected_logprobs(device)
    hidden, weight, targets, generator = _inputs(device)
    hidden.requires_grad_()
    weight.requires_grad_()
    g, h, advantages = (torch.randn(len(targets), generator=generator).to(device) for _ in range(3))

    ours = selected_logprobs(hidden, weight, targets)
    want = oracle.selected(oracle.head_logits(hidden, weight), targets)
    ours_sum, want_sum = ((g * result.logprob_N + h * result.entropy_N).sum() for result in (ours, want))
    _compare_gradients("selected_logprobs", ours_sum, want_sum, (hidden, weight))

    reference_hidden, reference_weight = hidden.detach() * 0.9, weight.detach() * 1.01
    ours = exact_kl(hidden, weight, reference_hidden, reference_weight, targets)
    reference_logits = oracle.head_logits(reference_hidden, reference_weight)
    want = oracle.two_heads(oracle.head_logits(hidden, weight), reference_logits, targets)
    _compare("exact_kl", ours, want)
    _compare_gradients("exact_kl", (g * ours.kl_N).sum(), (g * want.kl_N).sum(), (hidden, weight))

    old, settings = want.logprob_N.detach() + 0.3 * g, PpoSettings()
    ours = ppo_loss(hidden, weight, targets, old.float(), advantages, settings=settings, hint_lse_N=want.lse_N.detach())
    ones = torch.ones_like(advantages)
    total = oracle.ppo(oracle.head_logits(hidden, weight), targets, old, advantages, ones, old, settings)
    _compare("ppo_loss", [ours.loss / len(targets)], [total / len(targets)])
    _compare_gradients("ppo_loss", ours.loss, total, (hidden, weight))


def _inputs(device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator)
    weight = torch.randn(101, 24, generator=generator)
    targets = torch.randint(101, (37,), generator=generator)
    return hidden.to(device), weight.to(device), targets.to(device), generator


def _compare(op: str, ours: Iterable[torch.Tensor], want: Iterable[torch.Tensor]) -> None:
    for number, (got, oracle_value) in enumerate(zip(ours, want, strict=True)):
        error = float((got.detach().double() - oracle_value.detach()).abs().max())
        _refuse(op, f"result {number}", error, TOLERANCE, got)


def _compare_gradients(op: str, ours: torch.Tensor, want: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(want, inputs), strict=True)
    for number, (got, oracle_value) in enumerate(pairs):
        error = float((got - oracle_value).norm() / oracle_value.norm())
        _refuse(op, f"gradient {number}", error, GRADIENT_TOLERANCE, got)


def _refuse(op: str, what: str, error: float, allowed: float, on: torch.Tensor) -> None:
    if not error <= allowed:
        backend = backend_for(on).name
        raise KernelMismatchError(f"{op} by {backend} on {on.device}: {what} is off by {error:.2e} (allowed {allowed})")
