"""What a deterministic engine does to every operation whose bits could depend on the batch: one shape for all batches.

A matrix product may add up in another order when it has other rows, and a vectorised exponential may treat the last
elements of an array differently. In blocks of always as many rows, the rest zeros, neither happens: a row's numbers are
its own. That rows do not feel their place within a block is checked before serving (selfcheck.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import torch
from torch.nn import functional

from trimtab.generator.local.sampler import Sampled, SampleRows, sample

BLOCK = 16
"""Rows of a block; more would waste work on small batches, fewer would read the weights too often."""
LANES = 32  # of the widest vectorised loop, two registers of 16 floats


def padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`rows` [N, ...] with zero rows to make `count`."""
    return rows if len(rows) == count else torch.cat((rows, rows.new_zeros(count - len(rows), *rows.shape[1:])))


def whole_blocks(count: int) -> int:
    """`count` rounded up to whole blocks."""
    return -(-count // BLOCK) * BLOCK


def in_blocks(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """`function` of the inputs' rows (their count a whole number of blocks), a block at a time."""
    if len(inputs[0]) == BLOCK:
        return function(*inputs)
    return torch.cat([function(*parts) for parts in zip(*(rows.split(BLOCK) for rows in inputs), strict=True)])


def sample_in_blocks(logits_BV: torch.Tensor, rows: SampleRows, banned_BV: torch.Tensor | None = None) -> Sampled:
    """As `sampler.sample`, each row's bits its own."""
    count, vocab_size = logits_BV.shape
    missing = (0, -vocab_size % LANES, 0, -count % BLOCK)
    logits_BV = functional.pad(logits_BV, missing, value=-torch.inf)
    banned_BV = None if banned_BV is None else functional.pad(banned_BV, missing)
    filled = {field.name: np.resize(getattr(rows, field.name), len(logits_BV)) for field in fields(rows)}
    parts: list[Sampled] = []
    for start in range(0, len(logits_BV), BLOCK):
        block = slice(start, start + BLOCK)
        few = SampleRows(**{name: values[block] for name, values in filled.items()})
        parts.append(sample(logits_BV[block], few, None if banned_BV is None else banned_BV[block]))
    return Sampled(
        _joined([part.token_ids for part in parts], count), _joined([part.logprobs for part in parts], count)
    )


def _joined(parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    return np.concatenate(parts)[:count]
