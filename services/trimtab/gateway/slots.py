"""How many requests there may be at once; `rates` is about how often."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trimtab.gateway.problems import Problem


class Slots:
    """Room for `most` at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    @property
    def is_full(self) -> bool:
        """Whether none is left."""
        return self._taken >= self._most

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold one; Problem 429 where none is left."""
        if self.is_full:
            raise Problem("RESOURCE_EXHAUSTED", f"{self._taken} requests are in flight", retry_after_s=1.0)
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
