"""Blocking calls: channels, threads, cancelling. `transport_aio` is its asyncio twin.

What a call means is in the clients' modules, where it goes in `routing`, when it is repeated in `retries`.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from trimtab_client.calls import Call, Program, Stream
from trimtab_client.channel import Addresses, ChannelOptions, open_sync
from trimtab_client.connections import Connections
from trimtab_client.errors import TrimtabError, from_rpc_error
from trimtab_client.retries import RetryPlan
from trimtab_client.routing import Routing

T = TypeVar("T")


class SyncTransport:
    """Sends calls over one channel an address; thread-safe.

    Channels open with the first call, and anew in a forked child.
    """

    def __init__(self, addresses: Addresses, options: ChannelOptions) -> None:
        self.routing: Routing = Routing(addresses, options)
        self._connections = Connections(
            self.routing.addresses, options, opener=open_sync, closer=lambda channel: channel.close(), scope=os.getpid
        )

    def run(self, program: Program[T], timeout_s: float | None = None) -> T:
        """Carry out a program; one deadline for all its calls."""
        return self._run(program, self.routing.until(timeout_s))

    def unary(self, call: Call[T], timeout_s: float | None = None) -> T:
        """Send one call; a repeatable one is tried again, at the other addresses too, until its deadline."""
        return self._unary(call, self.routing.until(timeout_s), _InFlight())

    def everywhere(self, call: Call[T], timeout_s: float | None = None) -> list[T]:
        """Send one call to each address; answers in the addresses' order."""
        until = self.routing.until(timeout_s)

        def one(place: int, in_flight: _InFlight) -> T:
            return self._unary(call, until, in_flight, only=place)

        places = range(len(self.routing.addresses))
        return _at_once(one, places, len(places))

    def streams(self, program: Program[Sequence[Stream[T]]], timeout_s: float | None = None) -> Iterator[T]:
        """The items of all streams that a program makes, as they come; one deadline for all."""
        until = self.routing.until(timeout_s)
        streams = self._run(program, until)
        if len(streams) == 1:
            yield from self._stream(streams[0], until, _InFlight())
        else:
            yield from self._merged(streams, until)

    def close(self) -> None:
        """Close all channels; what is in flight is cancelled."""
        for channel in self._connections.close():
            channel.close()

    def _run(self, program: Program[T], until: float) -> T:
        def one(call: Call[Any], in_flight: _InFlight) -> Any:
            return self._unary(call, until, in_flight)

        try:
            calls = next(program)
            while True:
                calls = program.send(_at_once(one, calls, self.routing.calls_at_once))
        except StopIteration as end:
            return end.value

    def _unary(self, call: Call[T], until: float, in_flight: _InFlight, only: int | None = None) -> T:
        places, retries = self.routing.places(only), self.routing.retries(call, until, only)
        while True:
            try:
                with self._connections.using(next(places)) as connection:
                    rpc = connection.method(call).future(call.request, **self.routing.sending(until))
                    with in_flight.holding(rpc):
                        return call.read(rpc.result())
            except grpc.RpcError as failure:
                in_flight.pause(retries, self._error(call, failure))

    def _error(self, call: Call[Any], failure: grpc.RpcError) -> TrimtabError:
        """What a failed call is repeated by; raised where `close` ended it."""
        error = call.located(from_rpc_error(failure))
        if self._connections.closed:
            raise error from None
        return error

    def _stream(self, stream: Stream[T], until: float, in_flight: _InFlight) -> Iterator[T]:
        places, retries = self.routing.places(), None
        while (call := stream.next_call()) is not None:
            retries = retries or self.routing.retries(call, until)
            try:
                with self._connections.using(next(places)) as connection:
                    rpc = connection.method(call)(call.request, **self.routing.sending(until))
                    with in_flight.holding(rpc):
                        for message in rpc:
                            item = stream.accept(call.read(message))
                            retries.progressed()
                            yield item
                stream.ended()
            except grpc.RpcError as failure:
                error = self._error(call, failure)
                if not stream.may_resume():
                    raise error from None
                if stream.next_call() is not None:
                    in_flight.pause(retries, error)

    def _merged(self, streams: Sequence[Stream[T]], until: float) -> Iterator[T]:
        in_flight = _InFlight()
        arrived: queue.SimpleQueue[T | _Ended] = queue.SimpleQueue()

        def follow(stream: Stream[T]) -> None:
            failure: BaseException | None = None
            try:
                for item in self._stream(stream, until, in_flight):
                    arrived.put(item)
            except BaseException as error:
                failure = error
            arrived.put(_Ended(failure))

        pool = ThreadPoolExecutor(min(len(streams), self.routing.calls_at_once))
        try:
            for stream in streams:
                pool.submit(follow, stream)
            running = len(streams)
            while running:
                item = arrived.get()
                if not isinstance(item, _Ended):
                    yield item
                elif item.failure is None:
                    running -= 1
                else:
                    raise item.failure
        finally:
            in_flight.cancel()
            pool.shutdown(cancel_futures=True)


class _InFlight:
    """The running gRPC calls of one client call, so that the failure of one ends the others at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rpcs: set[Any] = set()
        self._cancelled = threading.Event()

    @contextmanager
    def holding(self, rpc: Any) -> Iterator[None]:
        """Keep the call on the list; it is cancelled if it is left before its end."""
        with self._lock:
            self._rpcs.add(rpc)
        try:
            if self._cancelled.is_set():
                rpc.cancel()
            yield
        finally:
            with self._lock:
                self._rpcs.discard(rpc)
            rpc.cancel()

    def pause(self, retries: RetryPlan, error: TrimtabError) -> None:
        """Wait for the next try; raises the error where there is none."""
        wait_s = retries.wait_s(error)
        if wait_s is None or self._cancelled.wait(wait_s):
            raise error from None

    def cancel(self) -> None:
        """End all running calls, and the pauses between tries."""
        self._cancelled.set()
        with self._lock:
            rpcs = list(self._rpcs)
        for rpc in rpcs:
            rpc.cancel()


class _Ended:
    """A stream's end, in the queue of what arrived."""

    def __init__(self, failure: BaseException | None) -> None:
        self.failure = failure


def _at_once(one: Callable[[Any, _InFlight], T], items: Sequence[Any], most: int) -> list[T]:
    """`one` of each item, several at a time; the first failure cancels the rest."""
    in_flight = _InFlight()
    if len(items) <= 1:
        return [one(item, in_flight) for item in items]
    pool = ThreadPoolExecutor(min(len(items), most))
    try:
        futures: list[Future[T]] = [pool.submit(one, item, in_flight) for item in items]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]
    finally:
        in_flight.cancel()
        pool.shutdown(cancel_futures=True)
