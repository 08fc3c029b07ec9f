"""Uniform draws that depend on (seed, position) and on nothing else, for a whole batch in one call.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the sample's seed is the key and
the position of the token the counter, so a draw needs no generator object, no state and no order of calls.
"""

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Ten rounds over four counter words and two key words, each a uint64 array [B] holding 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(_W0)) & _LOW, (k1 + np.uint64(_W1)) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds_B: np.ndarray, positions_B: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) with 52 random bits for each (uint64 seed, position >= 0); [B]."""
    seeds, positions = seeds_B.astype(np.uint64), positions_B.astype(np.uint64)
    zero = np.zeros_like(seeds)
    w0, w1, _, _ = philox4x32((positions & _LOW, positions >> _SHIFT, zero, zero), (seeds & _LOW, seeds >> _SHIFT))
    # 52 bits: u * total stays strictly below total after rounding, so an inverse-CDF draw never runs off the end.
    bits = ((w0 << _SHIFT) | w1) >> np.uint64(12)
    return bits.astype(np.float64) * 2.0**-52


def derive_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """The uint64 seed of one sample of a request with one seed for all."""
    words = [np.array([word & 0xFFFFFFFF], dtype=np.uint64) for word in (prompt_index, sample_index, 0x7452494D, 1)]
    key = np.array([seed & 0xFFFFFFFF], dtype=np.uint64), np.array([seed >> 32], dtype=np.uint64)
    w0, w1, _, _ = philox4x32(tuple(words), key)
    return (int(w0[0]) << 32) | int(w1[0])
