"""Where the metadata comes from by which servers join a call to the caller's trace (W3C Trace Context).

The client knows no tracing library: whoever has one sets a function that gives ``traceparent`` and the like.
`trimtab.runtime.tracing` does so for trimtab's services.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Carrier = Callable[[], Iterable[tuple[str, str]]]


def _nothing() -> Iterable[tuple[str, str]]:
    return ()


_carrier: Carrier = _nothing


def set_carrier(carrier: Carrier | None) -> None:
    """From now on every call of every client sends what `carrier()` gives; None: nothing."""
    global _carrier
    _carrier = carrier or _nothing


def carried() -> tuple[tuple[str, str], ...]:
    """The current trace as gRPC metadata; empty outside of a trace."""
    return tuple(_carrier())
