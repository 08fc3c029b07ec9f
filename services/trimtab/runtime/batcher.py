"""Groups the sequences of many calls into device batches of a bounded number of tokens.

Whenever the device is free it takes what waits, nearest deadline first, up to the token budget, and hands it over
sorted by length. It never sleeps to wait for company. It knows neither models nor the wire.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from trimtab.runtime.device_worker import DeviceWorker
from trimtab.runtime.errors import deadline_exceeded, exhausted, invalid, unavailable
from trimtab.runtime.metrics import Metrics

Item = TypeVar("Item")
Result = TypeVar("Result")

# A call without a deadline is ordered as if it had this one, so that hurried calls cannot starve it.
PATIENCE_S = 300.0


@dataclass(order=True)
class _Waiting(Generic[Item, Result]):
    order_s: float
    number: int
    item: Item = field(compare=False)
    size_tokens: int = field(compare=False)
    deadline: float | None = field(compare=False)
    future: "asyncio.Future[Result]" = field(compare=False)
    in_queue: bool = field(compare=False, default=True)


class Batcher(Generic[Item, Result]):
    """A bounded queue in front of one `DeviceWorker`.

    `compute` gets the items of one batch and returns as many results in the same order; an exception in place of a
    result fails that item only, a raised one fails the batch. `queue_limit` counts waiting items (those on the device
    are not waiting). Deadlines are `time.monotonic()` seconds.
    """

    def __init__(
        self,
        compute: Callable[[list[Item]], Sequence[Result | Exception]],
        worker: DeviceWorker,
        *,
        max_tokens_per_batch: int,
        queue_limit: int,
        metrics: Metrics | None = None,
    ) -> None:
        self._compute = compute
        self._worker = worker
        self._max_tokens = max_tokens_per_batch
        self._queue_limit = queue_limit
        self._metrics = metrics
        self._heap: list[_Waiting[Item, Result]] = []
        self._waiting = 0
        self._numbers = itertools.count()
        self._pump: asyncio.Task[None] | None = None
        self._closed = False
        self._seconds_per_item = 0.0

    @property
    def waiting(self) -> int:
        """Items in the queue, not counting those on the device."""
        return self._waiting

    def check_room(self, items: int) -> None:
        """RESOURCE_EXHAUSTED where `submit_all` would refuse so many now: ask before other work is spent on them."""
        if self._waiting and self._waiting + items > self._queue_limit:
            wait_s = min(30.0, max(0.1, self._seconds_per_item * self._waiting))
            raise exhausted(
                f"the queue holds {self._waiting} of {self._queue_limit} sequences; retry later or ask another replica",
                retry_after_s=wait_s,
            )

    async def submit(self, item: Item, size_tokens: int, deadline: float | None = None) -> Result:
        """Compute one item. RESOURCE_EXHAUSTED with RetryInfo: queue full. DEADLINE_EXCEEDED: never computed."""
        return (await self.submit_all([item], [size_tokens], deadline))[0]

    async def submit_all(
        self, items: Sequence[Item], sizes_tokens: Sequence[int], deadline: float | None = None
    ) -> list[Result]:
        """Compute the items of one call, admitted together or not at all; results in their order.

        An empty queue admits any call, so that one call of more than `queue_limit` items can be served. Where one
        item fails, or the caller is cancelled, those of its items that still wait leave the queue.
        """
        if self._closed:
            raise unavailable("the server is draining")
        if not items:
            raise invalid("tokens", "the batch is empty")
        self.check_room(len(items))
        futures = [self._enqueue(item, size, deadline) for item, size in zip(items, sizes_tokens, strict=True)]
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._run(), name="batcher")
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()

    async def close(self) -> None:
        """Refuse new work and fail what waits with UNAVAILABLE; a batch on the device is left to finish."""
        self._closed = True
        for waiting in self._heap:
            if not waiting.future.done():
                waiting.future.set_exception(unavailable("the server is draining"))
        if self._pump is not None:
            await asyncio.wait([self._pump])

    def _enqueue(self, item: Item, size_tokens: int, deadline: float | None) -> "asyncio.Future[Result]":
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        order_s = deadline if deadline is not None else time.monotonic() + PATIENCE_S
        entry = _Waiting(order_s, next(self._numbers), item, size_tokens, deadline, future)
        heapq.heappush(self._heap, entry)
        self._count(1)
        future.add_done_callback(lambda _: self._left(entry))
        return future

    def _left(self, entry: _Waiting[Item, Result]) -> None:
        """Count an entry out of the queue, once: taken for the device, cancelled, expired or refused."""
        if entry.in_queue:
            entry.in_queue = False
            self._count(-1)

    async def _run(self) -> None:
        await asyncio.sleep(0)  # calls that arrived in the same turn of the loop join the first batch
        while batch := self._take():
            started_s = time.monotonic()
            try:
                results = await self._worker.run(self._compute, [entry.item for entry in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"compute returned {len(results)} results for {len(batch)} items")
            except Exception as error:
                results = [error] * len(batch)
            elapsed_s = time.monotonic() - started_s
            self._seconds_per_item = elapsed_s / len(batch)
            if self._metrics is not None:
                self._metrics.observe_batch(len(batch), sum(entry.size_tokens for entry in batch), elapsed_s)
            for entry, result in zip(batch, results, strict=True):
                if entry.future.done():
                    continue
                if isinstance(result, Exception):
                    entry.future.set_exception(result)
                else:
                    entry.future.set_result(result)

    def _take(self) -> list[_Waiting[Item, Result]]:
        """The next batch: live entries in order of their deadlines while they fit, at least one; shortest first."""
        now_s = time.monotonic()
        batch: list[_Waiting[Item, Result]] = []
        tokens = 0
        while self._heap:
            entry = self._heap[0]
            if entry.future.done():
                heapq.heappop(self._heap)
                continue
            if entry.deadline is not None and entry.deadline <= now_s:
                heapq.heappop(self._heap)
                entry.future.set_exception(deadline_exceeded("the deadline passed while the sequence waited"))
                continue
            if batch and tokens + entry.size_tokens > self._max_tokens:
                break
            heapq.heappop(self._heap)
            self._left(entry)
            batch.append(entry)
            tokens += entry.size_tokens
        return sorted(batch, key=lambda entry: entry.size_tokens)

    def _count(self, change: int) -> None:
        self._waiting += change
        if self._metrics is not None:
            self._metrics.queue_depth.inc(change)  # of all batchers of the process
