"""When a failed call is tried again, and after how long; only for calls that are safe to repeat."""

from __future__ import annotations

import random
import time

from trimtab_client.errors import Cancelled, ResourceExhausted, TrimtabError, Unavailable

# Not there, or gone while the call was under way (a server that stops answers its last calls with CANCELLED).
GONE = (Unavailable, Cancelled)
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0


def may_repeat(error: TrimtabError) -> bool:
    """UNAVAILABLE always, and CANCELLED by the server; RESOURCE_EXHAUSTED only where it said when (RetryInfo)."""
    if isinstance(error, ResourceExhausted):
        return error.retry_after_s is not None
    return isinstance(error, GONE)


class RetryPlan:
    """The retries of one call until its deadline.

    A call that one address cannot take goes to each other address at once, which counts as no retry.
    After that the delay is exponential with jitter over its upper half, on top of what RetryInfo demands.

    Args:
        retries: most repeats, 0 for a call that is not safe to repeat.
        until: the call's deadline on `time.monotonic`.
        other_addresses: how many addresses beside the first can take the call.
        wait_when_full: whether a full queue is asked again after the time that it names, or is an error at once.
    """

    def __init__(self, retries: int, until: float, other_addresses: int = 0, *, wait_when_full: bool = True) -> None:
        self._retries = retries
        self._until = until
        self._wait_when_full = wait_when_full
        self._other_addresses = other_addresses if retries else 0
        self.progressed()

    def progressed(self) -> None:
        """The call got something through: what failed before no longer counts."""
        self._left = self._retries
        self._failovers = self._other_addresses
        self._delay_s = FIRST_DELAY_S

    def wait_s(self, error: TrimtabError) -> float | None:
        """Seconds to wait before the next try, or None where there is none."""
        if not may_repeat(error) or (isinstance(error, ResourceExhausted) and not self._wait_when_full):
            return None
        if isinstance(error, GONE) and self._failovers:
            self._failovers -= 1
            return 0.0 if time.monotonic() < self._until else None
        if not self._left:
            return None
        self._left -= 1
        wait_s = self._delay_s * (0.5 + 0.5 * random.random()) + (error.retry_after_s or 0.0)
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)
        return wait_s if time.monotonic() + wait_s < self._until else None
