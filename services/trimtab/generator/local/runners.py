"""Which runner decodes a model: the Llama family's own where it is right, transformers' forward for all others."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from trimtab.generator.engine import StagedPatches, StagedWeights
from trimtab.generator.local import selfcheck
from trimtab.generator.local.llama import LlamaRunner
from trimtab.generator.local.runner import ModelRunner
from trimtab.models.llama_weights import is_llama
from trimtab.runtime.logs import get_logger

log = get_logger(__name__)


class Runner(Protocol):
    """A live model with the keys and values of up to `max_rows` sequences, rows [0, live).

    Every method but `check` runs on the one thread that does model work.
    """

    max_rows: int
    takes_pieces: bool
    """Whether `extend` computes a prompt piece by piece."""

    def prefill(self, sequences: Sequence[np.ndarray], *, first_row: int, copies: Sequence[int] = ()) -> torch.Tensor:
        """Compute `sequences` (int32 ids) into the rows from `first_row` on; float32 logits [rows written, V].

        `copies[i]` rows are written for sequence i (one each by default).
        """
        ...

    def extend(self, token_ids: np.ndarray, *, row: int, start: int, copies: int = 1) -> torch.Tensor:
        """Compute the next tokens of a row that holds `start` of them; float32 logits [copies, V] of the last.

        With copies the rows behind are filled as this one.
        """
        ...

    def decode(
        self,
        tokens_B: np.ndarray,
        lengths_B: np.ndarray,
        prompts: Sequence[np.ndarray] = (),
        copies: Sequence[int] = (),
    ) -> torch.Tensor:
        """Feed one token a live row (at least one), whose past is `lengths_B` tokens long; and `prompts` behind them.

        Float32 logits [B and the rows written as by `prefill`, V].
        """
        ...

    def keep(self, survivors: Sequence[int], longest: int) -> None:
        """Keep rows `survivors`, in that order, as rows 0, 1, ...; the longest of them has `longest` tokens."""
        ...

    def clear(self, rows: Sequence[int]) -> None:
        """Forget what rows hold, numbers that are not finite too."""
        ...

    def reset(self) -> None:
        """Begin with an empty cache, whatever state a failed forward left."""
        ...

    def check(self, staged: StagedWeights | StagedPatches) -> None:
        """Raise ValueError where names and shapes are not those of the live model; callable from any thread."""
        ...

    def prepare(self, staged: StagedWeights | StagedPatches) -> Iterator[int]:
        """Get ready to take a checked version, a piece for each `next`; yields its elements. Nothing changes yet."""
        ...

    def take(self, staged: StagedWeights | StagedPatches) -> None:
        """Change to a checked version that `prepare` has come to the end of."""
        ...


def runner_of(model: PreTrainedModel, *, max_rows: int, deterministic: bool = False) -> Runner:
    """The fastest runner that gives this model's numbers.

    A deterministic one gives every sequence the same bits in any company; where the Llama family's cannot on this
    machine, and for other models, that is one row at a time.
    """
    if is_llama(model):
        runner = LlamaRunner(model, max_rows=max_rows, deterministic=deterministic)
        try:
            selfcheck.compare(model, runner)
            if deterministic:
                selfcheck.check_company(runner)
        except ValueError as error:
            log.warning("decoded by transformers, which is slower", reason=str(error))
        else:
            runner.reset()
            return runner
    return ModelRunner(model, max_rows=1 if deterministic else max_rows)
