"""What this machine's CPU brings, where the fastest way to compute depends on it.

Read from the kernel, so that every process on a machine chooses alike; elsewhere than on Linux nothing is assumed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def is_intel() -> bool:
    """Whether MKL, torch's own library of products, was made for it: on other CPUs with AVX512 it holds back."""
    return "GenuineIntel" in _words()


def has_amx() -> bool:
    """Whether it multiplies bfloat16 matrices in tiles."""
    return "amx_bf16" in _words()


def fuses_attention(dtype: torch.dtype, *, gradients: bool) -> bool:
    """Whether torch's fused attention beats matrix products on short sequences.

    It calls MKL block by block. In bfloat16 AMX steps in forward, while backward each block is copied into its layout:
    there a forward whose bits a training step's must have takes the products too.
    """
    if dtype is torch.float32:
        return is_intel()
    return dtype is torch.bfloat16 and has_amx() and not gradients


def compiles_by_shape(dtype: torch.dtype) -> bool:
    """Whether products are oneDNN's, which compiles a kernel for every shape it meets, in 1 to 5 ms: as long as all
    the products of a small model's layer take. Shapes are rounded there, so that few come."""
    return dtype is torch.bfloat16 and not _words().isdisjoint(("avx512_bf16", "amx_bf16"))


def rounded_rows(count: int) -> int:
    """`count` rounded up by an eighth at most, or to a multiple of 4: 8 numbers between a power of two and the next."""
    step = max(4, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


@cache
def _words() -> frozenset[str]:
    try:
        return frozenset(CPUINFO.read_text(encoding="utf-8").split())
    except OSError:
        return frozenset()
