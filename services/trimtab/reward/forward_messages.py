"""What a reward server and the process of a model say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Order:
    """The model that the process is started for; `threads` for its operations, None: torch's own choice."""

    path_or_id: str
    dtype: str
    device: str
    threads: int | None
    log_level: str
    log_format: Literal["auto", "json", "pretty"]


@dataclass(eq=False)
class ModelFacts:
    """All that a server says and needs of a model whose weights are elsewhere; the names are `ScalarModel`'s."""

    source: str
    tokenizer: Any
    tokenizer_digest: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_length: int
    mean: float
    std: float
    is_normalized: bool
    dtype: str
    architecture: str
    parameter_count: int


@dataclass(frozen=True, eq=False)
class Work:
    """A batch: int32 ids of each sequence; `alone`: a forward for each."""

    sequences: list[np.ndarray]
    alone: bool


@dataclass(frozen=True)
class Failure:
    """Why there is no answer; `field` of a ModelLoadError, else empty."""

    field: str
    reason: str
