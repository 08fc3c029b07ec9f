"""Two pieces of work at once, each on half of the CPU's threads.

A small model's step does not double its speed with the threads: between its many short ops they wait for one another.
Policy and value model trained side by side have nothing to wait for, and a step takes a quarter less time on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
        left, right = self._lanes[0].submit(first), self._lanes[1].submit(second)
        both: list[Future[Any]] = [left, right]
        wait(both)
        return left.result(), right.result()

    def close(self) -> None:
        """End the threads."""
        for lane in self._lanes:
            lane.shutdown()


def _take_threads(count: int) -> None:
    """Give this thread `count` threads; torch reads its process-wide count once more on a thread's first use."""
    torch.set_num_threads(count)
    torch.get_num_threads()
