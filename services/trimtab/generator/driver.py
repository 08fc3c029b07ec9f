"""Drives an engine on the device worker's thread and hands each outcome to the call that waits for it.

The event loop submits and cancels; the worker's thread steps, several times a visit while nothing ends, so that a small
model does not pay an event-loop hop a token. What the sequences mean is the service's business.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence

from trimtab.generator.engine import Engine, FailedSequence, FailureReason, FinishedSequence, Outcome, SequenceRequest
from trimtab.runtime.device_worker import DeviceWorker
from trimtab.runtime.errors import exhausted
from trimtab.runtime.logs import get_logger
from trimtab.runtime.metrics import Metrics

log = get_logger(__name__)

BURST_S = 0.02
FAILED_STEP = "the engine failed while it sampled this; the server's log says why"


class Ticket:
    """The sequences of one call: iterate over their outcomes as they end; `close` cancels what is left."""

    def __init__(self, driver: "EngineDriver", sequence_ids: Sequence[int]) -> None:
        self._driver = driver
        self._open = set(sequence_ids)
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue()

    def put(self, outcome: Outcome) -> None:
        """Called by the driver."""
        self._outcomes.put_nowait(outcome)

    async def outcomes(self) -> AsyncIterator[Outcome]:
        """Every sequence's outcome, in the order they end."""
        while self._open:
            outcome = await self._outcomes.get()
            self._open.discard(outcome.sequence_id)
            yield outcome

    def close(self) -> None:
        """Cancel what has not ended; its slots are free from the next step on."""
        if self._open:
            self._driver.cancel(self._open)
            self._open = set()


class EngineDriver:
    """One engine, one worker thread, many calls.

    At most `queue_limit` sequences wait for a slot; more are refused.
    """

    def __init__(self, engine: Engine, worker: DeviceWorker, metrics: Metrics, *, queue_limit: int) -> None:
        self.engine = engine
        self._worker = worker
        self._metrics = metrics
        self._queue_limit = queue_limit
        self._tickets: dict[int, Ticket] = {}
        self._wake = asyncio.Event()
        self._ids = itertools.count()

    def next_id(self) -> int:
        """A fresh sequence id (also used as prompt key)."""
        return next(self._ids)

    def submit(self, requests: Sequence[SequenceRequest]) -> Ticket:
        """Queue the sequences of one call.

        Raises RESOURCE_EXHAUSTED where they do not fit the queue; with RetryInfo if they ever could.
        """
        engine, count = self.engine, len(requests)
        room = self._queue_limit + engine.free_slots - engine.waiting
        if count > room:
            hopeless = count > self._queue_limit
            raise exhausted(
                f"{count} sequences do not fit the queue: {engine.waiting} wait, its limit is {self._queue_limit}"
                + ("; send fewer sequences in a request" if hopeless else ""),
                retry_after_s=None if hopeless else 1.0,
            )
        ticket = Ticket(self, [request.sequence_id for request in requests])
        self._tickets.update((request.sequence_id, ticket) for request in requests)
        engine.submit(requests)
        self.wake()
        return ticket

    def cancel(self, sequence_ids: set[int]) -> None:
        """Forget sequences whose call is gone."""
        for sequence_id in sequence_ids:
            self._tickets.pop(sequence_id, None)
        self.engine.cancel(list(sequence_ids))
        self.wake()

    def wake(self) -> None:
        """Say that the engine has work (a swap was asked for)."""
        self._wake.set()

    async def run(self) -> None:
        """Step the engine whenever it has work; runs until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.engine.has_work:
                await self._visit()

    async def _visit(self) -> None:
        try:
            outcomes = await self._worker.run(self._burst)
        except Exception as error:
            log.error("engine step failed; its sequences are given up", exc_info=error)
            lost = await self._worker.run(self.engine.reset)
            outcomes = [FailedSequence(sequence_id, FailureReason.BROKEN, FAILED_STEP) for sequence_id in lost]
        for outcome in outcomes:
            self._deliver(outcome)
        self._metrics.queue_depth.set(self.engine.waiting)

    def _burst(self) -> list[Outcome]:
        """Step until something ends, nothing is live, or the visit has taken long enough. Worker's thread."""
        started_s = time.monotonic()
        while True:
            outcomes = self.engine.step()
            now_s = time.monotonic()
            if outcomes or not self.engine.live or now_s - started_s > BURST_S:
                self._metrics.batch_seconds.observe(now_s - started_s)
                return outcomes

    def _deliver(self, outcome: Outcome) -> None:
        if isinstance(outcome, FinishedSequence):
            self._metrics.sequences.inc()
            self._metrics.tokens.inc(len(outcome.token_ids))
        ticket = self._tickets.pop(outcome.sequence_id, None)
        if ticket is not None:
            ticket.put(outcome)
