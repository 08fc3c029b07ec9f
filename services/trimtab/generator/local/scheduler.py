"""The local engine: schedule, run, postprocess, once a step.

Each step swaps weights where one is due, fills free slots from the queue and decodes one token for every live sequence,
both in one forward, and returns what ended. The cache layout is kv_cache.py's, the arithmetic of a choice sampler.py's.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.generator.engine import (
    FailedSequence,
    FailureReason,
    FinishedSequence,
    FinishReason,
    Outcome,
    SequenceRequest,
    StagedPatches,
    StagedWeights,
    SwapMode,
)
from trimtab.generator.local.blocks import sample_whole_blocks
from trimtab.generator.local.runners import Runner, runner_of
from trimtab.generator.local.sampler import sample
from trimtab.generator.local.slots import Slot, SlotTable
from trimtab.generator.local.stop_strings import StopStrings, response_text
from trimtab_client.versions import ModelVersion

# Of a new version made ready between two steps: a few milliseconds of work.
ELEMENTS_A_STEP = 1_000_000
NON_FINITE = "the model gave logits that are not finite numbers; the weights of this version are broken"


@dataclass(frozen=True)
class PendingSwap:
    """A version that is made ready (`rest` is what that still takes) and waits for its moment between two steps."""

    staged: StagedWeights | StagedPatches
    mode: SwapMode
    done: Future[ModelVersion]
    rest: Iterator[int]

    def make_ready(self) -> bool:
        """Do a step's share; whether all is done."""
        elements = 0
        for piece in self.rest:
            elements += piece
            if elements >= ELEMENTS_A_STEP:
                return False
        return True


@dataclass
class Filling:
    """Samples of a prompt longer than a step's budget, computed a piece a step into the row behind the live ones."""

    requests: list[SequenceRequest]
    computed: int = 0  # prompt tokens


class LocalEngine:
    """Continuous batching over a Hugging Face causal LM; implements `Engine`.

    Args:
        model: the live model; the engine changes its weights at a swap.
        eos_token_ids: tokens that end a response unless it ignores them.
        version: what `model` holds now.
        max_length: prompt and response together, tokens.
        max_slots: most sequences decoded at once.
        prefill_tokens: most prompt tokens (padding counted) computed between two decode steps; a longer prompt goes
            alone, in pieces where the runner takes them.
        deterministic: a seeded sample has the same bits whatever else is decoded with it, and whenever; slower.

    Raises:
        ValueError: an architecture this engine cannot serve.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Sequence[int],
        version: ModelVersion,
        max_length: int,
        max_slots: int = 64,
        prefill_tokens: int = 2048,
        deterministic: bool = False,
    ) -> None:
        self._runner: Runner = runner_of(model, max_rows=max_slots, deterministic=deterministic)
        self._draw = sample_whole_blocks if deterministic else sample
        self._tokenizer = tokenizer
        self._version = version
        self._max_length = max_length
        self._prefill_tokens = prefill_tokens
        output = model.get_output_embeddings()
        assert output is not None, "a causal LM has output embeddings"
        vocab_size = int(output.weight.shape[0])  # type: ignore[arg-type]
        ends = [token for token in eos_token_ids if 0 <= token < vocab_size]
        self._table = SlotTable(self._runner.max_rows, vocab_size, ends)
        self._queue: deque[SequenceRequest] = deque()
        self._lock = threading.Lock()
        self._inbox: list[SequenceRequest] = []
        self._cancelled: set[int] = set()
        self._pending: PendingSwap | None = None
        self._filling: Filling | None = None
        self._pause_s = 0.0

    @property
    def version(self) -> ModelVersion:
        """The version whose weights the next step runs."""
        return self._version

    @property
    def takes_patches(self) -> bool:
        """Its weights are in this process: single elements of them can be overwritten."""
        return True

    @property
    def pause_s(self) -> float:
        """The longest that sampling waited at a time for the newest change of weights, seconds."""
        return self._pause_s

    @property
    def waiting(self) -> int:
        """Sequences that no step has started yet."""
        with self._lock:
            return len(self._queue) + len(self._inbox)

    @property
    def live(self) -> int:
        """Sequences being decoded."""
        return self._table.count

    @property
    def free_slots(self) -> int:
        """Sequences that could start now."""
        return self._table.max_slots - self._table.count - len(self._filling_requests)

    @property
    def has_work(self) -> bool:
        """Whether there is anything for a step to do."""
        with self._lock:
            asked = bool(self._inbox or self._cancelled or self._pending)
        return asked or bool(self._queue) or self.live > 0 or self._filling is not None

    @property
    def _filling_requests(self) -> list[SequenceRequest]:
        return self._filling.requests if self._filling is not None else []

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        """Queue sequences; they enter as slots free up, in this order."""
        with self._lock:
            self._inbox.extend(requests)

    def cancel(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences at the next step; unknown and finished ones are ignored."""
        with self._lock:
            self._cancelled.update(sequence_ids)

    def swap(self, staged: StagedWeights | StagedPatches, mode: SwapMode) -> Future[ModelVersion]:
        """Change weights between two steps; see `Engine.swap`."""
        done: Future[ModelVersion] = Future()
        try:
            self._runner.check(staged)
        except ValueError as error:
            done.set_exception(error)
            return done
        with self._lock:
            replaced, self._pending = self._pending, PendingSwap(staged, mode, done, self._runner.prepare(staged))
            self._pause_s = 0.0
        if replaced is not None and replaced.done.set_running_or_notify_cancel():
            replaced.done.set_exception(ValueError(f"{replaced.staged.version} was replaced by {staged.version}"))
        return done

    def reset(self) -> list[int]:
        """Forget every live and waiting sequence, after a step that raised; their ids."""
        with self._lock:
            self._queue.extend(self._inbox)
            self._inbox.clear()
            self._cancelled.clear()
        requests = [*(slot.request for slot in self._table.slots), *self._filling_requests, *self._queue]
        self._queue.clear()
        self._filling = None
        self._runner.reset()
        self._table.keep([])
        return [request.sequence_id for request in requests]

    @torch.inference_mode()
    def step(self) -> list[Outcome]:
        """Swap if due, fill free slots, sample a token for every sequence that is live then; return what ended."""
        self._take_messages()
        started_s = time.perf_counter()
        self._swap_if_due()
        self._pause_s = max(self._pause_s, time.perf_counter() - started_s)
        if self._filling is None:
            chosen, outcomes = self._choose()
            if chosen and len(chosen[0].prompt_ids) > self._prefill_tokens and self._runner.takes_pieces:
                self._filling, chosen = Filling(chosen), []
        else:
            chosen, outcomes = [], []
        if self._filling is not None:
            outcomes += self._fill(self._filling)
        return outcomes + self._advance(chosen)

    def _take_messages(self) -> None:
        """Apply submits and cancels."""
        with self._lock:
            self._queue.extend(self._inbox)
            self._inbox.clear()
            cancelled, self._cancelled = self._cancelled, set()
        if cancelled:
            self._queue = deque(request for request in self._queue if request.sequence_id not in cancelled)
            if self._filling is not None:
                left = [request for request in self._filling.requests if request.sequence_id not in cancelled]
                self._filling = Filling(left, self._filling.computed) if left else None
            self._release([row for row, slot in enumerate(self._table.slots) if slot.request.sequence_id in cancelled])

    def _swap_if_due(self) -> None:
        pending = self._pending
        if pending is None or not self._is_ready(pending):
            return
        in_flight = [*(slot.request for slot in self._table.slots), *self._filling_requests]
        holders = [request for request in [*in_flight, *self._queue] if self._holds_back(request, pending)]
        if holders or (pending.mode is SwapMode.DRAIN and in_flight):
            return
        self._forget(pending)
        if not pending.done.set_running_or_notify_cancel():
            return
        try:
            self._runner.take(pending.staged)
        except Exception as error:
            pending.done.set_exception(error)
            raise
        self._version = pending.staged.version
        for row, slot in enumerate(self._table.slots):
            slot.marks.append((self._version, int(self._table.counts[row])))
        if self._filling is not None:
            self._filling.computed = 0
        if pending.mode is SwapMode.RECOMPUTE_KV:
            self._recompute()
        pending.done.set_result(self._version)

    def _is_ready(self, pending: PendingSwap) -> bool:
        """Do a step's share of making the version ready; whether all is done. One that can never come is dropped."""
        staged = pending.staged
        if isinstance(staged, StagedPatches) and staged.base != self._version:
            self._drop(pending, ValueError(f"it was staged beside {staged.base}, not {self._version}"))
            return False
        try:
            return pending.make_ready()
        except Exception as error:  # nothing that serves was touched: sequences go on
            self._drop(pending, error)
            return False

    def _drop(self, pending: PendingSwap, error: Exception) -> None:
        """Let a version go that cannot come; whoever asked for it is told why."""
        self._forget(pending)
        if pending.done.set_running_or_notify_cancel():
            pending.done.set_exception(error)

    def _forget(self, pending: PendingSwap) -> None:
        with self._lock:
            if self._pending is pending:
                self._pending = None

    def _holds_back(self, request: SequenceRequest, pending: PendingSwap) -> bool:
        """Whether the request can only be sampled by the version that is about to go."""
        accepts = request.accepts
        return accepts is not None and accepts(self._version) and not accepts(pending.staged.version)

    def _recompute(self) -> None:
        """Fill the cache of every live row anew with the present weights, a few rows at a time."""
        table, row = self._table, 0
        while row < table.count:
            past = [self._past(row)]
            while row + len(past) < table.count:
                following = self._past(row + len(past))
                width = max(len(tokens) for tokens in [*past, following])
                if width * (len(past) + 1) > self._prefill_tokens:
                    break
                past.append(following)
            self._runner.prefill(past, first_row=row)
            row += len(past)

    def _past(self, row: int) -> np.ndarray:
        """The tokens of a live row that are in the cache."""
        table = self._table
        sampled = table.tokens[row, : table.counts[row] - 1]
        return np.concatenate([table.slots[row].request.prompt_ids, sampled])

    def _fill(self, filling: Filling) -> list[Outcome]:
        """Compute the next piece of a long prompt; with its last one its samples come to live."""
        start, prompt_ids = filling.computed, filling.requests[0].prompt_ids
        piece = prompt_ids[start : start + self._prefill_tokens]
        filling.computed += len(piece)
        whole = filling.computed == len(prompt_ids)
        copies = len(filling.requests) if whole else 1
        logits = self._runner.extend(piece, row=self.live, start=start, copies=copies)
        if not whole:
            return []
        self._filling = None
        return self._sample(slice(self._add(filling.requests), self.live), logits)

    def _add(self, requests: Sequence[SequenceRequest]) -> int:
        """Give sequences the next rows; the first of these."""
        first = self.live
        for request in requests:
            self._table.add(Slot(request, self._stops_of(request), [(self._version, 0)]), self._max_length)
        return first

    def _stops_of(self, request: SequenceRequest) -> StopStrings | None:
        stops = request.sampling.stop
        return StopStrings(self._tokenizer, stops, request.prompt_ids) if stops else None

    def _choose(self) -> tuple[list[SequenceRequest], list[Outcome]]:
        """The next sequences to start, in order of arrival, within the free slots and the prefill budget.

        And those found on the way that can no longer start.
        """
        free, pending, now_s = self.free_slots, self._pending, time.monotonic()
        chosen: list[SequenceRequest] = []
        failed: list[Outcome] = []
        held: list[SequenceRequest] = []
        prompts, width, last_key = 0, 0, None
        while self._queue and len(chosen) < free:
            request = self._queue.popleft()
            if failure := self._refuse(request, now_s):
                failed.append(failure)
                continue
            if pending is not None and pending.mode is SwapMode.DRAIN and not self._holds_back(request, pending):
                held.append(request)
                continue
            if request.prompt_key != last_key:
                new_width = max(width, len(request.prompt_ids))
                if chosen and new_width * (prompts + 1) > self._prefill_tokens:
                    self._queue.appendleft(request)
                    break
                prompts, width, last_key = prompts + 1, new_width, request.prompt_key
            chosen.append(request)
        self._queue.extendleft(reversed(held))
        return chosen, failed

    def _refuse(self, request: SequenceRequest, now_s: float) -> FailedSequence | None:
        """Why a request that is next in line cannot start any more, or None."""
        if request.deadline_s is not None and request.deadline_s <= now_s:
            return FailedSequence(request.sequence_id, FailureReason.EXPIRED, "the deadline passed while it waited")
        if request.accepts is not None and not request.accepts(self._version):
            message = f"{self._version} has come to serve, which the request does not accept"
            return FailedSequence(request.sequence_id, FailureReason.VERSION, message)
        return None

    def _advance(self, new: Sequence[SequenceRequest]) -> list[Outcome]:
        """One forward: every live sequence's newest token and the prompts of `new`; sample what follows each."""
        live = slice(0, self.live)
        prompts: list[np.ndarray] = []
        copies: list[int] = []
        for before, request in zip([None, *new], new, strict=False):
            if before is not None and before.prompt_key == request.prompt_key:
                copies[-1] += 1
            else:
                prompts.append(request.prompt_ids)
                copies.append(1)
        self._add(new)
        if live.stop:
            logits = self._runner.decode(self._table.newest[live], self._table.lengths[live], prompts, copies)
            self._table.lengths[live] += 1
        elif new:
            logits = self._runner.prefill(prompts, first_row=0, copies=copies)
        else:
            return []
        return self._sample(slice(0, self.live), logits)

    def _sample(self, rows: slice, logits_BV: torch.Tensor) -> list[Outcome]:
        """Choose a token for each of these rows, and let go of the rows that end with it."""
        banned = self._table.banned(rows)
        banned_BV = None if banned is None else torch.from_numpy(banned).to(logits_BV.device)
        sampled = self._draw(logits_BV, self._table.sample_rows(rows), banned_BV)
        ended = self._table.record(rows, sampled)
        broken = [rows.start + int(offset) for offset in np.flatnonzero(np.isnan(sampled.logprobs))]
        failed_ids = [self._table.slots[row].request.sequence_id for row in broken]
        outcomes: list[Outcome] = [FailedSequence(failed, FailureReason.BROKEN, NON_FINITE) for failed in failed_ids]
        outcomes += [self._finish(row, reason) for row, reason in ended.items() if row not in broken]
        if broken:
            self._runner.clear(broken)
        self._release([*broken, *(row for row in ended if row not in broken)])
        return outcomes

    def _finish(self, row: int, reason: FinishReason) -> FinishedSequence:
        table, slot = self._table, self._table.slots[row]
        count = int(table.counts[row])
        tokens = table.tokens[row, :count].copy()
        stops = slot.request.sampling.stop if reason is FinishReason.STOP else ()
        return FinishedSequence(
            sequence_id=slot.request.sequence_id,
            token_ids=tokens,
            logprobs=table.logprobs[row, :count].copy(),
            text=response_text(self._tokenizer, slot.request.prompt_ids, tokens, stops),
            finish_reason=reason,
            runs=slot.runs(count),
        )

    def _release(self, rows: Sequence[int]) -> None:
        """Free rows: the holes are filled with the last live rows."""
        if not rows:
            return
        gone = set(rows)
        kept = self.live - len(gone)
        movers = iter(row for row in range(kept, self.live) if row not in gone)
        survivors = [next(movers) if row in gone else row for row in range(kept)]
        behind = [self.live] if self._filling is not None else []  # the row of a long prompt follows the live ones
        self._table.keep(survivors)
        computed = self._filling.computed if self._filling is not None else 0
        self._runner.keep([*survivors, *behind], max(self._table.longest, computed))
