"""Where each try of a call goes, until when, and with what: shared by both transports."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

from trimtab_client.calls import Call
from trimtab_client.channel import Addresses, ChannelOptions, parse_addresses
from trimtab_client.credentials import Bearer
from trimtab_client.retries import RetryPlan
from trimtab_client.trace_context import carried

CALLS_AT_ONCE_PER_ADDRESS = 2
# A name of DNS may stand for any number of replicas, over which gRPC shares calls out: it gets the work of so many.
REPLICAS_OF_A_NAME = 4
SHORTEST_TIMEOUT_S = 0.001


class Routing:
    """The addresses of a client. Calls start at one after another, a repeat goes to the next."""

    def __init__(self, addresses: Addresses, options: ChannelOptions) -> None:
        self.addresses: list[str] = parse_addresses(addresses)
        self.options = options
        self._bearer = Bearer(options, self.addresses)
        self._turn = itertools.count(random.randrange(len(self.addresses)))

    @property
    def replicas(self) -> int:
        """How many replicas the addresses are taken to be, when work is shared out."""
        return sum(REPLICAS_OF_A_NAME if address.startswith("dns:") else 1 for address in self.addresses)

    @property
    def calls_at_once(self) -> int:
        """Most calls that one batch has in flight."""
        return CALLS_AT_ONCE_PER_ADDRESS * self.replicas

    def until(self, timeout_s: float | None) -> float:
        """The deadline, on `time.monotonic`, of a call that starts now."""
        return time.monotonic() + (self.options.timeout_s if timeout_s is None else timeout_s)

    def places(self, only: int | None = None) -> Iterator[int]:
        """The position of the address of each try; `only` this one if given."""
        if only is not None:
            return itertools.repeat(only)
        first = next(self._turn)
        return (place % len(self.addresses) for place in itertools.count(first))

    def retries(self, call: Call[Any], until: float, only: int | None = None) -> RetryPlan:
        """The retries of one call."""
        others = 0 if only is not None else len(self.addresses) - 1
        retries = self.options.retries if call.repeatable else 0
        return RetryPlan(retries, until, others, wait_when_full=self.options.wait_when_full)

    def sending(self, until: float) -> dict[str, Any]:
        """The keyword arguments of a stub's method: the time left and the metadata."""
        metadata = (*self._bearer.metadata(), *carried())
        return {"timeout": max(until - time.monotonic(), SHORTEST_TIMEOUT_S), "metadata": metadata}
