"""The start-up checks that every service makes of its kernels, made before it is started."""

from __future__ import annotations

from trimtab.doctor.devices import CPU
from trimtab.doctor.finding import Finding, failed, ok, skipped
from trimtab.kernels.backends import backend_for
from trimtab.kernels.selfcheck import KernelMismatchError, check_training_kernels


def kernel_findings(wanted: set[str], there: set[str]) -> list[Finding]:
    """One finding a device that the recipe computes on: the fused ops against plain torch in float64."""
    return [_check(device) if device in there else _absent(device) for device in sorted(wanted)]


def _check(device: str) -> Finding:
    import torch

    backend = backend_for(torch.empty(0, device=device)).name
    try:
        check_training_kernels(device)
    except (KernelMismatchError, RuntimeError) as error:
        return failed(f"kernels on {device}", str(error), "do not train here; report the device and this line")
    return ok(f"kernels on {device}", f"{backend}: log-probs, KL, the PPO loss and gradients are plain torch's")


def _absent(device: str) -> Finding:
    what = "no CPU" if device == CPU else "this machine has no such device"
    return skipped(f"kernels on {device}", f"{what}; the services check themselves when they start")
