"""The vLLM engine: `Engine` over an `AsyncLLM` that lives on an event loop and a thread of its own.

trimtab keeps the queue: vLLM gets no more sequences than there are slots, so that order, deadlines and versions are
decided here, by the local engine's rules. sequences.py is the life of one sequence, weights.py a change of weights.
"""

import asyncio
import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from trimtab.generator.engine import (
    FailedSequence,
    FailureReason,
    FinishedSequence,
    Outcome,
    SequenceRequest,
    StagedPatches,
    StagedWeights,
    SwapMode,
)
from trimtab.generator.local.live_weights import check_weights
from trimtab.generator.vllm.probe import Expected
from trimtab.generator.vllm.sequences import SequenceSampler
from trimtab.generator.vllm.weights import Weights
from trimtab.runtime.logs import get_logger
from trimtab_client.versions import ModelVersion

log = get_logger(__name__)

# A step without an outcome waits this long for one.
STEP_S = 0.02
GIVEN_UP = "vLLM gave it up; the server's log says why"
GONE = "vLLM's engine is gone; this server ends"
# How often vLLM is asked whether it is still there, and how often in a row it may leave that unanswered.
ALIVE_S = 1.0
MOST_MISSED = 2
TAINTED = "it was sampled by weights that vLLM had not loaded as they are"


@dataclass(frozen=True)
class PendingSwap:
    """A version that waits for its moment, and what its full forward says."""

    staged: StagedWeights
    expected: Expected
    mode: SwapMode
    done: Future[ModelVersion]


class VllmEngine:
    """Implements `Engine`. Made by start.py.

    Args:
        loop: runs on a thread of its own; everything that touches `llm` runs there.
        sampler, weights: over the same `AsyncLLM`.
        patience_s: how long vLLM may leave a question unanswered; it answers between two steps. None is for ever.
        on_failure: called with the reason once vLLM can serve no more; every sequence is LOST from then on.
        shut_down: ends vLLM and the loop.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sampler: SequenceSampler,
        weights: Weights,
        *,
        max_slots: int,
        patience_s: float | None,
        on_failure: Callable[[str], None],
        shut_down: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._sampler = sampler
        self._weights = weights
        self._max_slots = max_slots
        self._patience_s = patience_s
        self._on_failure = on_failure
        self._shut_down = shut_down
        # Guards what several threads read: the queue, the live sequences and the outcomes.
        self._changed = threading.Condition()
        self._queue: deque[SequenceRequest] = deque()
        self._cancelled: set[int] = set()
        self._live: dict[int, tuple[SequenceRequest, asyncio.Task[None]]] = {}
        self._outcomes: list[Outcome] = []
        self._is_gone = False
        self._pending: PendingSwap | None = None
        self._swaps = 0  # asked for and not yet done
        # While new weights are unproven, what they sampled is held back here.
        self._held: list[Outcome] | None = None
        self._wake = asyncio.Event()
        self._preparing = asyncio.Lock()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._start(self._coordinate())
        self._start(self._watch())

    @property
    def version(self) -> ModelVersion:
        """The version that samples now."""
        return self._weights.version

    @property
    def takes_patches(self) -> bool:
        """vLLM is given whole checkpoints."""
        return False

    @property
    def pause_s(self) -> float:
        """How long sampling waited for the newest change of weights, seconds."""
        return self._weights.pause_s

    @property
    def waiting(self) -> int:
        """Sequences that vLLM does not have yet."""
        with self._changed:
            return len(self._queue)

    @property
    def live(self) -> int:
        """Sequences that vLLM has."""
        with self._changed:
            return len(self._live)

    @property
    def free_slots(self) -> int:
        """Sequences that could start now."""
        return self._max_slots - self.live

    @property
    def has_work(self) -> bool:
        """Whether an outcome may come."""
        with self._changed:
            return bool(self._queue or self._live or self._outcomes or self._cancelled or self._swaps)

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        """Queue sequences; they enter as slots free up, in this order."""
        with self._changed:
            self._queue.extend(requests)
            if self._is_gone:
                self._lose_all()
        self._call(self._wake.set)

    def cancel(self, sequence_ids: Sequence[int]) -> None:
        """Forget sequences; unknown and finished ones are ignored."""
        with self._changed:
            self._cancelled.update(sequence_ids)
        self._call(self._wake.set)

    def step(self) -> list[Outcome]:
        """What ended since the last step; waits a moment where nothing has."""
        with self._changed:
            if not self._outcomes:
                self._changed.wait(STEP_S)
            outcomes, self._outcomes = self._outcomes, []
            return outcomes

    def reset(self) -> list[int]:
        """Forget every live and waiting sequence; their ids."""
        with self._changed:
            forgotten = [*self._live, *(request.sequence_id for request in self._queue)]
            self._cancelled.update(self._live)
            self._queue.clear()
        self._call(self._wake.set)
        return forgotten

    def swap(self, staged: StagedWeights | StagedPatches, mode: SwapMode) -> Future[ModelVersion]:
        """Change weights between two steps; see `Engine.swap`. ValueError too where vLLM did not load them rightly."""
        done: Future[ModelVersion] = Future()
        try:
            if not isinstance(staged, StagedWeights) or staged.folder is None:
                raise ValueError("the vllm engine takes whole versions, with the folder they were read from")
            check_weights(self._weights.live_tensors(), staged.tensors)
        except ValueError as error:
            done.set_exception(error)
            return done
        with self._changed:
            if self._is_gone:
                done.set_exception(RuntimeError(GONE))
                return done
            self._swaps += 1
        done.add_done_callback(self._swap_ended)
        self._call(lambda: self._start(self._prepare(staged, mode, done)))
        return done

    def close(self) -> None:
        """End vLLM and its processes; blocks for some seconds. Nothing can be asked of the engine afterwards."""
        self._shut_down()
        # Or vLLM's object is let go when the interpreter ends, when it can no longer find its own modules.
        del self._sampler, self._weights, self._shut_down
        gc.collect()

    def _call(self, function: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _swap_ended(self, _: Future[ModelVersion]) -> None:
        with self._changed:
            self._swaps -= 1

    # What follows runs on the engine's own loop.

    async def _coordinate(self) -> None:
        """Act on whatever changed, one thing after another."""
        while not self._is_gone:
            await self._wake.wait()
            self._wake.clear()
            try:
                self._drop_cancelled()
                await self._swap_if_due()
                self._admit()
            except Exception as error:
                log.error("vLLM cannot serve any more", exc_info=error)
                self._give_up()

    async def _watch(self) -> None:
        """Notice when vLLM's processes are gone, or when they hang."""
        missed = 0
        while missed < MOST_MISSED:
            await asyncio.sleep(ALIVE_S)
            try:
                await asyncio.wait_for(self._weights.ask(), self._patience_s)
                missed = 0
            except TimeoutError:
                missed += 1
            except Exception:
                break
        self._give_up()

    def _give_up(self) -> None:
        """Nothing more can be sampled: every sequence that is here, or comes, is lost."""
        if self._is_gone:
            return
        pending, self._pending = self._pending, None
        if pending is not None:
            _fail(pending.done, RuntimeError(GONE))
        with self._changed:
            self._is_gone, self._held = True, None
            self._lose_all()
        self._on_failure("vLLM's engine is gone")

    def _lose_all(self) -> None:
        for sequence_id in [*self._live, *(request.sequence_id for request in self._queue)]:
            self._put(FailedSequence(sequence_id, FailureReason.LOST, GONE))
        self._live.clear()
        self._queue.clear()

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            if cancelled:
                self._queue = deque(request for request in self._queue if request.sequence_id not in cancelled)
            tasks = [self._live[sequence_id][1] for sequence_id in cancelled if sequence_id in self._live]
        for task in tasks:
            task.cancel()

    def _admit(self) -> None:
        """Hand sequences to vLLM as slots are free, and give up those that can no longer start."""
        pending, now_s = self._pending, time.monotonic()
        held: list[SequenceRequest] = []
        with self._changed:
            while self._queue and len(self._live) < self._max_slots:
                request = self._queue.popleft()
                if failure := self._refuse(request, now_s):
                    self._put(failure)
                elif pending is not None and pending.mode is SwapMode.DRAIN and not self._holds_back(request, pending):
                    held.append(request)
                else:
                    task = self._start(self._sample(request))
                    self._live[request.sequence_id] = (request, task)
            self._queue.extendleft(reversed(held))

    def _refuse(self, request: SequenceRequest, now_s: float) -> FailedSequence | None:
        """Why a request that is next in line cannot start any more, or None."""
        if request.deadline_s is not None and request.deadline_s <= now_s:
            return FailedSequence(request.sequence_id, FailureReason.EXPIRED, "the deadline passed while it waited")
        if request.accepts is not None and not request.accepts(self.version):
            message = f"{self.version} has come to serve, which the request does not accept"
            return FailedSequence(request.sequence_id, FailureReason.VERSION, message)
        return None

    async def _sample(self, request: SequenceRequest) -> None:
        outcome: Outcome | None = None
        try:
            outcome = await self._sampler.sample(request, self._weights.label)
        except Exception as error:
            if self._weights.is_dead:
                self._give_up()
                return
            log.error("vLLM failed a sequence", sequence=request.sequence_id, exc_info=error)
            outcome = FailedSequence(request.sequence_id, FailureReason.BROKEN, GIVEN_UP)
        finally:
            with self._changed:
                if self._live.pop(request.sequence_id, None) is not None and outcome is not None:
                    self._put(outcome)
            self._wake.set()

    def _put(self, outcome: Outcome) -> None:
        if self._held is not None:
            self._held.append(outcome)
            return
        self._outcomes.append(outcome)
        self._changed.notify_all()

    def _holds_back(self, request: SequenceRequest, pending: PendingSwap) -> bool:
        """Whether the request can only be sampled by the version that is about to go."""
        accepts = request.accepts
        return accepts is not None and accepts(self.version) and not accepts(pending.staged.version)

    async def _prepare(self, staged: StagedWeights, mode: SwapMode, done: Future[ModelVersion]) -> None:
        """Compute what the version should say while the one before goes on serving, then let it wait for its moment."""
        async with self._preparing:
            try:
                expected = await asyncio.to_thread(self._weights.expected, staged)
                await self._weights.stage(staged)
            except Exception as error:
                _fail(done, ValueError(f"it could not be made ready: {error}"))
                return
            if self._is_gone:
                _fail(done, RuntimeError(GONE))
                return
            replaced, self._pending = self._pending, PendingSwap(staged, expected, mode, done)
            if replaced is not None:
                _fail(replaced.done, ValueError(f"{replaced.staged.version} was replaced by {staged.version}"))
            self._wake.set()

    async def _swap_if_due(self) -> None:
        pending = self._pending
        if pending is None:
            return
        with self._changed:
            in_flight = [request for request, _ in self._live.values()]
            holders = [request for request in [*in_flight, *self._queue] if self._holds_back(request, pending)]
        if holders or (pending.mode is SwapMode.DRAIN and in_flight):
            return
        self._pending = None
        if not pending.done.set_running_or_notify_cancel():
            return
        with self._changed:
            self._held = []
        try:
            version = await self._weights.change(
                pending.staged, pending.expected, recompute_kv=pending.mode is SwapMode.RECOMPUTE_KV
            )
        except ValueError as error:
            await self._take_back()
            pending.done.set_exception(error)
        except Exception:
            pending.done.set_exception(RuntimeError(GONE))
            raise
        else:
            self._release(lambda outcome: outcome)
            pending.done.set_result(version)

    async def _take_back(self) -> None:
        """Fail what the refused weights may have sampled."""
        with self._changed:
            live = list(self._live.values())
        for _, task in live:
            task.cancel()
        await asyncio.gather(*(task for _, task in live), return_exceptions=True)
        with self._changed:
            for request, _ in live:
                self._put(FailedSequence(request.sequence_id, FailureReason.BROKEN, TAINTED))
        self._release(
            lambda outcome: (
                FailedSequence(outcome.sequence_id, FailureReason.BROKEN, TAINTED)
                if isinstance(outcome, FinishedSequence)
                else outcome
            )
        )

    def _release(self, judged: Callable[[Outcome], Outcome]) -> None:
        """Let out what was held back."""
        with self._changed:
            held, self._held = self._held or [], None
            for outcome in held:
                self._put(judged(outcome))


def _fail(done: Future[ModelVersion], error: Exception) -> None:
    if done.set_running_or_notify_cancel():
        done.set_exception(error)
