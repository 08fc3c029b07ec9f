"""Start-up check: the backend that will serve is compared with plain torch in float64 on a small random input."""

from __future__ import annotations

import torch

from trimtab.kernels.api import selected_logprobs

TOLERANCE = 2e-5


class KernelMismatchError(RuntimeError):
    """A backend computes other numbers than plain torch; it must not serve."""


def check_selected_logprobs(device: torch.device | str = "cpu") -> None:
    """Raise KernelMismatchError if log-probs, lse or entropy are off by more than 2e-5."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator)
    weight = torch.randn(101, 24, generator=generator)
    targets = torch.randint(101, (37,), generator=generator)
    got = selected_logprobs(hidden.to(device), weight.to(device), targets.to(device), temperature=0.7)
    logp = torch.log_softmax(hidden.double() @ weight.double().T / 0.7, dim=1)
    lse = torch.logsumexp(hidden.double() @ weight.double().T / 0.7, dim=1)
    want = (logp.gather(1, targets[:, None])[:, 0], lse, -(logp.exp() * logp).sum(1))
    for name, ours, oracle in zip(("logprob", "lse", "entropy"), got, want, strict=True):
        error = float((ours.cpu().double() - oracle).abs().max())
        if not error <= TOLERANCE:
            raise KernelMismatchError(
                f"selected_logprobs on {device}: {name} is off by {error:.2e} (allowed {TOLERANCE})"
            )
