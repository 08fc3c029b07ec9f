"""The live sequences: one row of numpy arrays each, so that a step's bookkeeping is a few array operations.

Row i here is row i of the KV cache. Only sequences with stop strings or stop tokens of their own cost Python work a
step. Rows are kept dense: `keep` moves the survivors to the front, as the cache's `compact` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from trimtab.generator.engine import FinishReason, SequenceRequest, TokenRun
from trimtab.generator.local.philox import uniforms
from trimtab.generator.local.sampler import Sampled, SampleRows
from trimtab.generator.local.stop_strings import StopStrings
from trimtab_client.versions import ModelVersion

FIRST_TOKENS = 128
DRAWS = 64
"""Positions whose uniform numbers are drawn at once, so that few steps call the generator."""
ROW_ARRAYS = (
    *("lengths", "newest", "counts", "limits", "min_tokens", "ignores_eos", "has_stops"),
    *("seeds", "draws", "temperatures", "top_ps", "top_ks", "tokens", "logprobs"),
)


@dataclass
class Slot:
    """What of a live sequence does not fit an array."""

    request: SequenceRequest
    stops: StopStrings | None
    # (version, tokens sampled before its first), in order.
    marks: list[tuple[ModelVersion, int]] = field(default_factory=list)

    def runs(self, count: int) -> tuple[TokenRun, ...]:
        """Version runs of the first `count` tokens; versions that sampled none are left out."""
        ends = [start for _, start in self.marks[1:]] + [count]
        spans = [(version, end - start) for (version, start), end in zip(self.marks, ends, strict=True)]
        return tuple(TokenRun(version, tokens) for version, tokens in spans if tokens > 0)


class SlotTable:
    """State of up to `max_slots` live sequences, rows [0, count)."""

    def __init__(self, max_slots: int, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self.max_slots = max_slots
        self.slots: list[Slot] = []
        self.end_token_ids = np.array(sorted(set(end_token_ids)), dtype=np.int64)
        self._is_end_V = np.zeros(vocab_size, dtype=bool)
        self._is_end_V[self.end_token_ids] = True
        n = max_slots
        # KV length: prompt and all sampled tokens but the newest, which is fed by the next step.
        self.lengths = np.zeros(n, np.int64)
        self.newest = np.zeros(n, np.int64)
        self.counts = np.zeros(n, np.int64)
        self.limits = np.zeros(n, np.int64)
        self.min_tokens = np.zeros(n, np.int64)
        self.ignores_eos = np.zeros(n, bool)
        self.has_stops = np.zeros(n, bool)
        self.seeds = np.zeros(n, np.uint64)
        self.draws = np.zeros((n, DRAWS))  # of the DRAWS positions among which the next token is
        self.temperatures = np.ones(n, np.float32)
        self.top_ps = np.ones(n, np.float32)
        self.top_ks = np.zeros(n, np.int64)
        self.tokens = np.zeros((n, FIRST_TOKENS), np.int32)
        self.logprobs = np.zeros((n, FIRST_TOKENS), np.float32)

    @property
    def count(self) -> int:
        """Live sequences."""
        return len(self.slots)

    @property
    def longest(self) -> int:
        """KV length of the longest live sequence, tokens; 0 without any."""
        return int(self.lengths[: self.count].max()) if self.slots else 0

    def add(self, slot: Slot, max_length: int) -> None:
        """Append a sequence whose prompt is in the cache and whose first token is to be sampled."""
        row, request, sampling = self.count, slot.request, slot.request.sampling
        prompt_length = len(request.prompt_ids)
        limit = min(sampling.max_tokens, max_length - prompt_length)
        self.lengths[row], self.counts[row], self.limits[row] = prompt_length, 0, limit
        self.min_tokens[row], self.ignores_eos[row] = sampling.min_tokens, sampling.ignore_eos
        self.has_stops[row] = bool(sampling.stop or sampling.stop_token_ids)
        self.seeds[row], self.temperatures[row] = request.seed, sampling.temperature
        self.top_ps[row], self.top_ks[row] = sampling.top_p, sampling.top_k
        self.slots.append(slot)

    def sample_rows(self, rows: slice) -> SampleRows:
        """How to sample these rows' next tokens."""
        counts = self.counts[rows]
        places = counts % DRAWS
        if (due := rows.start + np.flatnonzero(places == 0)).size:
            positions = self.counts[due, None] + np.arange(DRAWS)
            self.draws[due] = uniforms(self.seeds[due].repeat(DRAWS), positions.ravel()).reshape(-1, DRAWS)
        return SampleRows(
            draws=self.draws[np.arange(rows.start, rows.stop), places],
            temperatures=self.temperatures[rows],
            top_ps=self.top_ps[rows],
            top_ks=self.top_ks[rows],
        )

    def banned(self, rows: slice) -> np.ndarray | None:
        """Tokens [B, V] that min_tokens forbids now, or None where it forbids none."""
        early = np.flatnonzero(self.counts[rows] < self.min_tokens[rows])
        if early.size == 0:
            return None
        banned_BV = np.zeros((rows.stop - rows.start, self._is_end_V.size), dtype=bool)
        for row in early:
            if not self.ignores_eos[rows.start + row]:
                banned_BV[row, self.end_token_ids] = True
            banned_BV[row, list(self.slots[rows.start + row].request.sampling.stop_token_ids)] = True
        return banned_BV

    def record(self, rows: slice, sampled: Sampled) -> dict[int, FinishReason]:
        """Append one token to each of these rows; the rows that are now at their end, and why."""
        index, counts = np.arange(rows.start, rows.stop), self.counts[rows]
        self._reserve(int(counts.max()) + 1)
        self.tokens[index, counts] = sampled.token_ids
        self.logprobs[index, counts] = sampled.logprobs
        self.newest[rows] = sampled.token_ids
        self.counts[rows] += 1
        stopped = self._is_end_V[sampled.token_ids] & ~self.ignores_eos[rows]
        for offset in np.flatnonzero(self.has_stops[rows]):
            stopped[offset] |= self._meets_own_stop(rows.start + int(offset))
        full = self.counts[rows] >= self.limits[rows]
        ended = np.flatnonzero(stopped | full)
        return {
            rows.start + int(offset): FinishReason.STOP if stopped[offset] else FinishReason.LENGTH for offset in ended
        }

    def _meets_own_stop(self, row: int) -> bool:
        """Whether the newest token is one of the row's stop tokens or completes one of its stop strings."""
        slot, count = self.slots[row], int(self.counts[row])
        if int(self.newest[row]) in slot.request.sampling.stop_token_ids:
            return True
        if slot.stops is None:
            return False
        found = slot.stops.push(self.tokens[row, :count])
        return found and count >= self.min_tokens[row]

    def keep(self, survivors: Sequence[int]) -> None:
        """Keep rows `survivors`, in that order, as rows 0, 1, ..."""
        index = np.asarray(survivors, dtype=np.int64)
        moved = np.flatnonzero(index != np.arange(index.size))
        for name in ROW_ARRAYS:
            array = getattr(self, name)
            array[moved] = array[index[moved]]
        self.slots = [self.slots[row] for row in survivors]

    def _reserve(self, tokens: int) -> None:
        """Grow the token log to hold `tokens` a row."""
        have = self.tokens.shape[1]
        if tokens > have:
            self.tokens = np.pad(self.tokens, ((0, 0), (0, have)))
            self.logprobs = np.pad(self.logprobs, ((0, 0), (0, have)))
