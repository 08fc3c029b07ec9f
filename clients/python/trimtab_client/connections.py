"""The open channels of a client, one an address, shared by both transports.

When the TLS files change, calls that start from then on get new channels; the old ones close when their last call
has ended, so that a renewed certificate interrupts nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from trimtab_client.calls import Call
from trimtab_client.channel import ChannelOptions
from trimtab_client.credentials import Files, is_whole

C = TypeVar("C")


class Connection(Generic[C]):
    """One channel, its stubs, and how many calls are on it."""

    def __init__(self, channel: C) -> None:
        self.channel = channel
        self.calls = 0
        self.retired = False
        self._stubs: dict[type, Any] = {}

    def method(self, call: Call[Any]) -> Any:
        """What sends this call."""
        stub = self._stubs.get(call.stub)
        if stub is None:
            stub = self._stubs[call.stub] = call.stub(self.channel)
        return getattr(stub, call.method)


class Connections(Generic[C]):
    """Opens channels with the first call, anew where the TLS files changed, and anew in another scope.

    `scope` names where channels are good: the process (a forked child needs its own) or the event loop.
    """

    def __init__(
        self,
        addresses: list[str],
        options: ChannelOptions,
        *,
        opener: Callable[[str, ChannelOptions], C],
        closer: Callable[[C], None],
        scope: Callable[[], object],
    ) -> None:
        self._addresses = addresses
        self._options = options
        self._open = opener
        self._close = closer
        self._scope = scope
        self._lock = threading.Lock()
        self._here: object = None
        self._connections: dict[int, Connection[C]] = {}
        self._retired: list[Connection[C]] = []
        self._closed = False
        tls = options.tls
        self._files = Files([] if tls is None else [tls.ca, tls.cert, tls.key])

    @contextmanager
    def using(self, place: int) -> Iterator[Connection[C]]:
        """The connection to the address at `place`, kept open while the block runs. ValueError after `close`."""
        renew = self._files.changed() and self._options.tls is not None and is_whole(self._options.tls)
        with self._lock:
            if self._closed:
                raise ValueError("the client is closed; make a new one")
            here = self._scope()
            if self._here != here:
                self._connections, self._retired, self._here = {}, [], here
            if renew:
                self._files.accept()
                self._retire()
            if place not in self._connections:
                self._connections[place] = Connection(self._open(self._addresses[place], self._options))
            connection = self._connections[place]
            connection.calls += 1
        try:
            yield connection
        finally:
            self._release(connection)

    @property
    def closed(self) -> bool:
        """Whether this side has ended the calls itself."""
        return self._closed

    def close(self) -> list[C]:
        """Take no more calls; the channels of this scope, which the caller closes."""
        with self._lock:
            self._closed = True
            here = self._here == self._scope()
            channels = [connection.channel for connection in (*self._connections.values(), *self._retired)]
            self._connections, self._retired = {}, []
        return channels if here else []

    def _retire(self) -> None:
        for connection in self._connections.values():
            connection.retired = True
            if connection.calls:
                self._retired.append(connection)
            else:
                self._close(connection.channel)
        self._connections = {}

    def _release(self, connection: Connection[C]) -> None:
        with self._lock:
            connection.calls -= 1
            if connection.retired and not connection.calls and connection in self._retired:
                self._retired.remove(connection)
                self._close(connection.channel)
