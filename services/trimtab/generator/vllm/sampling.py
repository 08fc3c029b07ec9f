"""Sampling inside vLLM by trimtab's own rules: a seed gives the tokens that the local engine gives.

`SeededChoice` is a logits processor, vLLM's public plugin. It chooses each row's token itself, by the local engine's
sampler, and leaves a row where nothing but that token is possible and its logit is its log-probability over the full
vocabulary. vLLM then takes the likeliest token (to it every request is greedy) and reports that number, since its
logprobs mode is "processed_logits". Nothing depends on vLLM's samplers or on their random state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams  # type: ignore[import-not-found]
from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]
from vllm.v1.sample.logits_processor import (  # type: ignore[import-not-found]
    BatchUpdate,
    LogitsProcessor,
    process_dict_updates,
)

from trimtab.generator.engine import Sampling
from trimtab.generator.local.philox import uniforms
from trimtab.generator.local.sampler import SampleRows, choose

KEY = "trimtab"
# Reported instead of a log-probability where the logits are not finite numbers; no log-probability is above 0.
BROKEN = 1.0


def sampling_params(
    sampling: Sampling, *, seed: int, end_token_ids: Sequence[int], max_tokens: int, stream: bool
) -> SamplingParams:
    """The parameters of one sequence as vLLM takes them. With `stream` outputs come as they grow, else once."""
    ends = [*(() if sampling.ignore_eos else end_token_ids), *sampling.stop_token_ids]
    rules = [seed, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_tokens, ends]
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        stop_token_ids=ends,
        ignore_eos=True,  # the model's ends are among the stop tokens
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        extra_args={KEY: rules},
    )


def probe_params() -> SamplingParams:
    """Parameters that ask for the logits of a prompt's own tokens, and one greedy token with its log-probability."""
    params = sampling_params(Sampling(1, temperature=0.0), seed=0, end_token_ids=(), max_tokens=1, stream=False)
    params.prompt_logprobs = 0
    return params


@dataclass
class Row:
    """How one request is sampled; `output_ids` is vLLM's own list of its tokens so far."""

    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_tokens: int
    end_token_ids: list[int]
    output_ids: Sequence[int]


class SeededChoice(LogitsProcessor):
    """Chooses every row's token from its seed and position."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if KEY not in (sampling_params.extra_args or {}):
            raise ValueError(f"extra_args lacks {KEY!r}: this engine takes requests of trimtab's only")

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, Row] = {}
        self._fixed: tuple[np.ndarray, ...] | None = None

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests as they enter, leave and move within the batch."""
        if process_dict_updates(self._rows, batch_update, _row):
            self._fixed = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] in which all but the chosen tokens are -inf, and those the tokens' log-probabilities."""
        rows = [self._rows[index] for index in range(logits.shape[0])]
        if self._fixed is None:
            self._fixed = (
                np.array([row.seed for row in rows], np.uint64),
                np.array([row.temperature for row in rows], np.float32),
                np.array([row.top_p for row in rows], np.float32),
                np.array([row.top_k for row in rows], np.int64),
            )
        seeds, temperatures, top_ps, top_ks = self._fixed
        positions = np.array([len(row.output_ids) for row in rows], np.int64)
        sample_rows = SampleRows(uniforms(seeds, positions), temperatures, top_ps, top_ks)
        tokens_B, logprobs_B = choose(logits, sample_rows, _banned(rows, logits))
        logprobs_B = torch.nan_to_num(logprobs_B, nan=BROKEN)
        return logits.fill_(-torch.inf).scatter_(1, tokens_B[:, None], logprobs_B[:, None])


def _row(params: SamplingParams, _: list[int] | None, output_ids: list[int]) -> Row:
    seed, temperature, top_p, top_k, min_tokens, ends = params.extra_args[KEY]
    return Row(seed, temperature, top_p, top_k, min_tokens, ends, output_ids)


def _banned(rows: Sequence[Row], logits: torch.Tensor) -> torch.Tensor | None:
    """End tokens [B, V] of rows that have not reached their min_tokens, or None without any."""
    early = [(index, row) for index, row in enumerate(rows) if len(row.output_ids) < row.min_tokens]
    if not early:
        return None
    banned_BV = torch.zeros(logits.shape, dtype=torch.bool)
    for index, row in early:
        banned_BV[index, row.end_token_ids] = True
    return banned_BV.to(logits.device)
