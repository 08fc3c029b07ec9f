"""The seed of each sample, fixed before a request leaves: so a repeat, or a split over servers, samples the same.

A call's one seed becomes the samples' seeds by Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011), as the generator service derives them when it is called without this SDK.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_TAG = 0x7452494D, 1


def sample_seeds(
    prompts: int, samples: int, seed: int | None, seeds: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    """One uint64 seed a sample of each prompt: the given `seeds`, or derived from `seed`, or drawn.

    ValueError where `seeds` does not hold one list of `samples` seeds a prompt, or a seed is no uint64.
    """
    if seeds is not None:
        if len(seeds) != prompts or any(len(row) != samples for row in seeds):
            raise ValueError(f"seeds: give one list of {samples} seeds for each of the {prompts} prompts")
        return [[_checked(value, "seeds") for value in row] for row in seeds]
    if seed is None:
        return [[secrets.randbits(64) for _ in range(samples)] for _ in range(prompts)]
    seed = _checked(seed, "sampling.seed")
    return [[derive_seed(seed, prompt, sample) for sample in range(samples)] for prompt in range(prompts)]


def derive_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """The uint64 seed of one sample of a call with one seed for all."""
    c0, c1, c2, c3 = prompt_index & _LOW, sample_index & _LOW, *_TAG
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return (c0 << 32) | c1


def _checked(seed: int, name: str) -> int:
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name}: {seed} is not in [0, 2^64)")
    return int(seed)
