"""Two pieces of work at once, each on half of the CPU's threads.

A small model's step does not double its speed with the threads: between its many short ops they wait for one another.
Policy and value model trained side by side have nothing to wait for, and a step takes a quarter less time on two cores.
What only one of the two has to do, the LM head over a large vocabulary, would leave the other half idle: for such work
they meet, and it gets all threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from typing import Any, TypeVar

import torch

from trimtab.trainer.ranks import Ranks

A = TypeVar("A")
B = TypeVar("B")


class SideBySide:
    """Runs pairs of functions, each function always on the same thread; one after the other off the CPU.

    `threads` is the budget of the two together; with one thread, too, they run one after the other.
    """

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        shares = [threads - threads // 2, threads // 2] if device == "cpu" and threads > 1 else []
        self._lanes = [ThreadPoolExecutor(1, "lane") for _ in shares]
        self._meeting = _Meeting()
        for lane, share in zip(self._lanes, shares, strict=True):
            lane.submit(_take_threads, share).result()
        if shares:
            _take_threads(threads)

    @classmethod
    def of_ranks(cls, device: str, threads: int, ranks: Ranks) -> SideBySide:
        """As above; with several ranks one after the other, as all ranks' exchanges must come in one order."""
        return cls(device, threads if ranks.world == 1 else 1)

    @property
    def splits(self) -> bool:
        """Whether two functions really run at the same time."""
        return bool(self._lanes)

    def run(self, first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
        """Both results, once both have ended; raises what the first, or else the second, raised."""
        if not self._lanes:
            return first(), second()
        self._meeting = _Meeting()
        both: list[Future[Any]] = [
            lane.submit(self._meeting.lane, function)
            for lane, function in zip(self._lanes, (first, second), strict=True)
        ]
        self._meeting.host()
        return both[0].result(), both[1].result()

    def alone(self, work: Callable[[], A]) -> A:
        """Inside `first`: what `work` returns or raises, on the threads of both while `second` waits at `make_way`.

        Neither waits for the other once it has ended.
        """
        if not self._lanes:
            return work()
        grad = torch.is_grad_enabled()

        def in_mode() -> A:
            with torch.set_grad_enabled(grad):  # it is a thread's own
                return work()

        return self._meeting.attend(in_mode)

    def make_way(self) -> None:
        """Inside `second`: wait until the `alone` of `first` at this place is done."""
        if self._lanes:
            self._meeting.attend(None)

    def close(self) -> None:
        """End the threads."""
        for lane in self._lanes:
            lane.shutdown()


class _Meeting:
    """Where two lanes wait for each other, as often as they like, while the thread that is host works for the first."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._lanes = 2
        self._arrived: list[tuple[Callable[[], Any] | None, Future[Any]]] = []

    def lane(self, function: Callable[[], A]) -> A:
        """What `function` returns; once it has ended nobody waits for this lane."""
        try:
            return function()
        finally:
            with self._changed:
                self._lanes -= 1
                self._changed.notify()

    def attend(self, work: Callable[[], Any] | None) -> Any:
        """What the host's run of `work` returned, once it and the other lane's at this meeting have ended."""
        done: Future[Any] = Future()
        with self._changed:
            self._arrived.append((work, done))
            self._changed.notify()
        return done.result()

    def host(self) -> None:
        """Hold meetings until both lanes have ended."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._arrived) >= self._lanes)
                arrived, self._arrived = self._arrived, []
            if not arrived:
                return
            for work, done in sorted(arrived, key=lambda attendance: attendance[0] is None):
                try:
                    done.set_result(None if work is None else work())
                except BaseException as error:
                    done.set_exception(error)


def _take_threads(count: int) -> None:
    """Give this thread `count` threads; torch reads its process-wide count once more on a thread's first use."""
    torch.set_num_threads(count)
    torch.get_num_threads()
