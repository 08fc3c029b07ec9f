"""What every generation engine takes, gives and promises.

An engine is fed sequences and stepped; a step takes milliseconds, whatever it finds to do. driver.py steps it on the
device worker's thread, service.py turns wire messages into these types and back.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trimtab_client.versions import ModelVersion


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


class SwapMode(StrEnum):
    """What becomes of sequences in flight when a new version arrives."""

    # They finish on the old version, new ones wait, then the weights change.
    DRAIN = "drain"
    # They go on over their old keys and values; the completion tells which version sampled which tokens.
    KEEP = "keep"
    # As keep, but their keys and values are computed anew by the new version.
    RECOMPUTE_KV = "recompute_kv"


@dataclass(frozen=True)
class Sampling:
    """Checked sampling parameters of one sequence; tokens, and probabilities without units."""

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class SequenceRequest:
    """One response to sample.

    Attributes:
        sequence_id: unique in the engine's life.
        prompt_ids: int32 ids, at least one, fewer than the engine's max_length.
        prompt_key: sequences with an equal key have equal prompts and may share one prefill.
        seed: uint64; with the position it decides every draw.
        deadline_s: time.monotonic() after which it is not started, or None.
        accepts: whether a version may sample its tokens; None accepts every one.
    """

    sequence_id: int
    prompt_ids: np.ndarray
    prompt_key: int
    seed: int
    sampling: Sampling
    deadline_s: float | None = None
    accepts: Callable[[ModelVersion], bool] | None = None


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens sampled by one version."""

    version: ModelVersion
    token_count: int


@dataclass(frozen=True)
class FinishedSequence:
    """One sampled response: int32 `token_ids` and float32 `logprobs` of equal length, the end token included."""

    sequence_id: int
    token_ids: np.ndarray
    logprobs: np.ndarray
    text: str
    finish_reason: FinishReason
    runs: tuple[TokenRun, ...]


class FailureReason(StrEnum):
    """Why a sequence ended without a response."""

    # Its deadline passed before it was started.
    EXPIRED = "expired"
    # It does not accept the version that serves now.
    VERSION = "version"
    # The engine or the model is at fault.
    BROKEN = "broken"
    # The engine is gone with its process; another server can sample it.
    LOST = "lost"


@dataclass(frozen=True)
class FailedSequence:
    """A sequence that ended without a response."""

    sequence_id: int
    reason: FailureReason
    message: str


@dataclass(frozen=True)
class WeightPatch:
    """New values of some elements of one tensor: flat positions (int64) and values in the live dtype."""

    name: str
    positions: Any
    values: Any


@dataclass(frozen=True)
class StagedPatches:
    """What differs from the version `base`, which must be the one served at the swap; later patches overwrite."""

    version: ModelVersion
    base: ModelVersion
    patches: Sequence[WeightPatch]


@dataclass(frozen=True)
class StagedWeights:
    """A new version in host memory, already verified: its tensors by the names of the model's state dict.

    They belong to the engine from the swap on; it may leave the weights of before in them. `folder` is where they were
    read: an engine that runs in processes of its own reads them there too.
    """

    version: ModelVersion
    tensors: dict[str, Any]
    folder: Path | None = None


Outcome = FinishedSequence | FailedSequence


class Engine(Protocol):
    """Continuous batching of sequences over one model.

    `submit`, `cancel` and `swap` may be called from any thread; `step` only from the one that does model work.
    """

    @property
    def version(self) -> ModelVersion:
        """The version whose weights the next step runs."""
        ...

    @property
    def takes_patches(self) -> bool:
        """Whether a new version may come as `StagedPatches`."""
        ...

    @property
    def pause_s(self) -> float:
        """The longest that sampling waited at a time for the newest change of weights, seconds."""
        ...

    @property
    def waiting(self) -> int:
        """Sequences that no step has started yet."""
        ...

    @property
    def live(self) -> int:
        """Sequences being decoded."""
        ...

    @property
    def free_slots(self) -> int:
        """Sequences that could start now."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether there is anything for a step to do."""
        ...

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        """Queue sequences; they enter as slots free up, in this order."""
        ...

    def cancel(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences at the next step; their slots are free from then on and no outcome is told."""
        ...

    def step(self) -> list[Outcome]:
        """Schedule, run the model once for each kind of work, return what ended."""
        ...

    def reset(self) -> list[int]:
        """Forget every live and waiting sequence, after a step that raised; their ids."""
        ...

    def swap(self, staged: StagedWeights | StagedPatches, mode: SwapMode) -> Future[ModelVersion]:
        """Change weights between two steps; the future gives the new version once it serves.

        Fails with ValueError, and changes nothing, when the tensors do not fit the model. A sequence that accepts the
        served version and refuses the new one holds the swap back until it ends. A later swap replaces one that waits.
        """
        ...
