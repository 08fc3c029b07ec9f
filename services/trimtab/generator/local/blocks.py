"""What a deterministic engine does so that no row's bits depend on the batch.

A matrix product may add up in another order when it has other rows: products run in blocks of always as many
(models/packed_linear.py). A vectorised exponential may treat the last elements of an array differently: everything
else runs on whole blocks, which end where a vector ends. That rows feel neither their place nor their company is
checked before serving (selfcheck.py).
"""

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


def sample_whole_blocks(logits_BV: torch.Tensor, rows: SampleRows, banned_BV: torch.Tensor | None = None) -> Sampled:
    """As `sampler.sample`, each row's bits its own."""
    count, vocab_size = logits_BV.shape
    missing = (0, -vocab_size % LANES, 0, -count % BLOCK)
    logits_BV = functional.pad(logits_BV, missing, value=-torch.inf)
    banned_BV = None if banned_BV is None else functional.pad(banned_BV, missing)
    filled = {field.name: np.resize(getattr(rows, field.name), len(logits_BV)) for field in fields(rows)}
    sampled = sample(logits_BV, SampleRows(**filled), banned_BV)
    return Sampled(sampled.token_ids[:count], sampled.logprobs[:count])
