"""The one thread that touches the model.

torch work of a server never runs on the event loop and never on two threads at once; handlers await `run`. Batching is
`batcher`'s business, not this module's.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class DeviceWorker:
    """A named thread that runs functions one after another, in the order they were given.

    `threads` is the worker's number of compute threads; every other thread of the process computes alone, since
    OpenMP's threads sleep between two ops once there are more of them than cores. None leaves torch's own choice.
    """

    def __init__(self, name: str, *, threads: int | None = None) -> None:
        self._threads = threads
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=self._set_thread_budget)
        self._lock = threading.Lock()
        self._unfinished = 0
        self._progress_s = time.monotonic()

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run on the worker's thread and return its result; a caller cancelled while it waits in line runs nothing."""

        def step() -> R:
            self.progressed()
            return function(*args, **kwargs)

        with self._lock:
            if self._unfinished == 0:
                self._progress_s = time.monotonic()
            self._unfinished += 1
        try:
            future = self._executor.submit(step)
        except RuntimeError:
            self._ended(None)
            raise
        future.add_done_callback(self._ended)
        return await asyncio.wrap_future(future)

    def progressed(self) -> None:
        """Say that work got on: for a function that takes minutes in many small steps."""
        self._progress_s = time.monotonic()

    def stalled_s(self) -> float:
        """Seconds since a function last began or ended while others wait or one runs; 0 without work. Any thread."""
        with self._lock:
            return time.monotonic() - self._progress_s if self._unfinished else 0.0

    def close(self, *, wait: bool = True) -> None:
        """Drop what waits; with `wait` return only when the running function has ended."""
        self._executor.shutdown(wait=wait, cancel_futures=True)

    def _ended(self, future: Future[Any] | None) -> None:
        with self._lock:
            self._unfinished -= 1
            self._progress_s = time.monotonic()

    def _set_thread_budget(self) -> None:
        if self._threads is not None:
            import torch

            torch.set_num_threads(self._threads)
            torch.get_num_threads()  # a thread's first use takes over the process-wide count, which goes back to 1 here
            others = Thread(target=torch.set_num_threads, args=(1,))
            others.start()
            others.join()
