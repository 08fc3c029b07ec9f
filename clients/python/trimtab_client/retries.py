"""When a failed call is tried again, and after how long; only for calls that are safe to repeat."""

from __future__ import annotations

import random
from collections.abc import Iterator

from trimtab_client.errors import ResourceExhausted, TrimtabError, Unavailable

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0


def may_repeat(error: TrimtabError) -> bool:
    """UNAVAILABLE always; RESOURCE_EXHAUSTED only where the server said when (RetryInfo)."""
    if isinstance(error, ResourceExhausted):
        return error.retry_after_s is not None
    return isinstance(error, Unavailable)


def delays(retries: int) -> Iterator[float]:
    """Seconds before each retry: exponential, with jitter over the upper half."""
    delay_s = FIRST_DELAY_S
    for _ in range(retries):
        yield delay_s * (0.5 + 0.5 * random.random())
        delay_s = min(2 * delay_s, LONGEST_DELAY_S)


def delay_for(error: TrimtabError, planned_s: float) -> float:
    """The server's own RetryInfo, where it is longer than the planned delay."""
    return max(planned_s, error.retry_after_s or 0.0)
