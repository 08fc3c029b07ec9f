"""Which implementation of the kernels serves a tensor: Triton on CUDA GPUs, chunked torch everywhere else.

A backend is a module's worth of functions behind the custom operators; none of them knows autograd. Float64 has no
tensor cores to win by and always goes to chunked torch, the oracle of the self-check.
TRIMTAB_KERNELS=torch or =triton takes the choice away (triton without a GPU: its interpreter, TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Backend:
    """The functions of one backend; `chunked_torch`, `chunked_kl` and `chunked_ppo` document each one's arguments."""

    name: str
    head_forward: Callable[..., Any]
    head_backward: Callable[..., Any]
    logits_forward: Callable[..., Any]
    logits_backward: Callable[..., Any]
    kl_forward: Callable[..., Any]
    kl_backward: Callable[..., Any]
    ppo: Callable[..., Any]


def backend_for(tensor: torch.Tensor) -> Backend:
    """The backend of a tensor's device and dtype.

    Raises:
        ValueError: TRIMTAB_KERNELS names no backend.
    """
    forced = os.environ.get("TRIMTAB_KERNELS", "")
    if forced not in ("", "torch", "triton"):
        raise ValueError(f"TRIMTAB_KERNELS={forced}: torch or triton, or leave it unset")
    wanted = forced or ("triton" if tensor.is_cuda and _triton_installed() else "torch")
    return _triton() if wanted == "triton" and tensor.dtype != torch.float64 else _torch()


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _torch() -> Backend:
    from trimtab.kernels import chunked_kl, chunked_ppo, chunked_torch

    return Backend(
        name="torch",
        head_forward=chunked_torch.head_forward,
        head_backward=chunked_torch.head_backward,
        logits_forward=chunked_torch.logits_forward,
        logits_backward=chunked_torch.logits_backward,
        kl_forward=chunked_kl.kl_forward,
        kl_backward=chunked_kl.kl_backward,
        ppo=chunked_ppo.ppo,
    )


@cache
def _triton() -> Backend:
    from trimtab.kernels import triton_backward, triton_kl, triton_logits, triton_ppo, triton_stats

    return Backend(
        name="triton",
        head_forward=triton_stats.head_forward,
        head_backward=triton_backward.head_backward,
        logits_forward=triton_logits.logits_forward,
        logits_backward=triton_logits.logits_backward,
        kl_forward=triton_kl.kl_forward,
        kl_backward=triton_kl.kl_backward,
        ppo=triton_ppo.ppo,
    )
